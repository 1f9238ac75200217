"""`escala cost | bench | propose | explore` and `escala laws plan`: what runs cost, and which to make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from escala.cli import laws, progress, render, render_forecasts, render_plans
from escala.cli.cluster import Json
from escala.cli.home import open_home
from escala.cli.jobs import Follow, Overrides, follow_job
from escala.cli.laws import Name, Refresh
from escala.contract.errors import LawError

if TYPE_CHECKING:
    from escala.views.plans import PlanView, ProposalView

ClusterName = Annotated[
    str | None,
    typer.Option("--cluster", help="A name in clusters/, or a file. [default: ESCALA_CLUSTER, else local]"),
]
Precision = Annotated[str, typer.Option(help="fp32 or bf16: at which of the devices' speeds.")]
MaxParams = Annotated[float | None, typer.Option(help="Bound on N total.")]
MaxMemory = Annotated[
    float | None,
    typer.Option("--max-memory-gb", help="Bound on a device's memory. [default: all, with --cluster]"),
]
DataTokens = Annotated[float | None, typer.Option(help="Unique tokens; more are repeats.")]
InferenceTokens = Annotated[float | None, typer.Option(help="That will be served.")]
Kappa = Annotated[float, typer.Option(help="FLOPs per active parameter and token.")]
ContextTokens = Annotated[
    float | None, typer.Option(help="T. [default: that of the law's runs; form ndt: the best]")
]
MaxContextTokens = Annotated[float | None, typer.Option(help="Bound on T, for form ndt.")]
Experts = Annotated[float, typer.Option("--n-total-over-active", help="Bound for a law of form moe.")]
Workers = Annotated[bool, typer.Option("--workers", help="Also a table: what each number of workers takes.")]
MaxWorkers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Look at so many; beyond the cluster's devices by its link. [default: its devices]"
    ),
]
Submit = Annotated[bool, typer.Option("--submit", help="Queue the run, configured like the law's runs.")]
PoolFile = Annotated[
    Path | None,
    typer.Option("--pool", help="A CSV of runs that could be made: choose among its rows, counted from 0."),
]
Targets = Annotated[
    Path | None, typer.Option(help="With --pool: a CSV of the points whose loss is to be known.")
]
CostColumn = Annotated[
    str | None, typer.Option("--cost", help="With --pool: its column that says what a row costs.")
]
bench_nouns = typer.Typer(no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for verb in (cost, propose, explore):
        app.command()(verb)
    laws.nouns.command()(plan)
    bench_nouns.callback()(_bench)
    bench_nouns.command()(device)
    bench_nouns.command()(attention)
    app.add_typer(bench_nouns, name="bench")


def _bench() -> None:
    """Measure what this cluster's devices do."""


def cost(
    files: Annotated[list[Path] | None, typer.Argument(help="YAML specs; later ones win.")] = None,
    overrides: Overrides = None,
    compute_flops: Annotated[
        float | None, typer.Option(help="The one dial: model, tokens, batch, learning rate by recipe.")
    ] = None,
    cluster: ClusterName = None,
    workers: Workers = False,
    max_workers: MaxWorkers = None,
    json: Json = False,
) -> None:
    """Say what a pretraining run would cost on a cluster: memory, communication, time, energy, money; how many workers
    pay.
    """
    found = open_home().cost(files or (), overrides or (), compute_flops, cluster, max_workers)
    render_plans.cost(found, json, workers)


def device(
    to: Annotated[Path, typer.Option(help="The cluster's file; its prices and energy are kept.")],
    workers: Annotated[int, typer.Option(help="As many as work at once in a run.")] = 1,
    gpus_per_worker: Annotated[int, typer.Option(help="1: measure GPUs.")] = 0,
    json: Json = False,
) -> None:
    """Measure one worker's speed, memory and link while all work, and write the cluster's file."""
    escala = open_home()
    with progress.reporting("submitting", json) as report:
        job = escala.bench_device(workers, gpus_per_worker, report=report)
    follow_job(escala, job.id, json)
    render_plans.device(escala.write_cluster(job.id, to), to, json)


def attention(
    to: Annotated[Path, typer.Option(help="A cluster's file that holds a device; the table goes into it.")],
    kind: Annotated[
        list[str] | None, typer.Option(help="A kind, beside others; exact among them. [default: all]")
    ] = None,
    max_context_tokens: Annotated[
        int, typer.Option(help="Contexts are powers of two from 256 to this.")
    ] = 65_536,
    heads: Annotated[int, typer.Option(help="Query and key/value heads.")] = 4,
    head_size: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    window_tokens: Annotated[int, typer.Option(help="Of the kinds that have a window.")] = 512,
    features: Annotated[int, typer.Option(help="Width of phi, of the kinds that have features.")] = 256,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32 or bf16; again for both. [default: fp32]")
    ] = None,
    gpus_per_worker: Annotated[int, typer.Option(help="1: measure a GPU.")] = 0,
    json: Json = False,
) -> None:
    """Measure each kind of attention by context, and write into the cluster's file where it overtakes exact."""
    escala = open_home()
    escala.check_bench_file(to)  # before it takes minutes
    asked: dict[str, object] = {
        "contexts": [1 << power for power in range(8, max(9, max_context_tokens.bit_length()))],
        "heads": heads,
        "head_size": head_size,
        "window_tokens": window_tokens,
        "features": features,
        "resources": {"gpus_per_worker": gpus_per_worker},
        **({"kinds": kind} if kind else {}),
        **({"precisions": precision} if precision else {}),
    }
    with progress.reporting("submitting", json) as report:
        job = escala.bench_attention(asked, report=report)
    follow_job(escala, job.id, json)
    render_plans.attention(escala.write_attention(job.id, to), to, json)


def plan(
    law: Name,
    compute_flops: Annotated[float | None, typer.Option(help="A budget.")] = None,
    usd: Annotated[float | None, typer.Option(help="A budget, by the cluster's price.")] = None,
    hours: Annotated[float | None, typer.Option(help="A budget of training time on the cluster.")] = None,
    kwh: Annotated[float | None, typer.Option(help="A budget, by the cluster's energy.")] = None,
    target_loss: Annotated[
        float | None, typer.Option(help="Instead of a budget: the least compute that reaches this loss.")
    ] = None,
    cluster: ClusterName = None,
    precision: Precision = "bf16",
    max_params: MaxParams = None,
    max_memory_gb: MaxMemory = None,
    data_tokens: DataTokens = None,
    inference_tokens: InferenceTokens = None,
    kappa: Kappa = 6.0,
    context_tokens: ContextTokens = None,
    max_context_tokens: MaxContextTokens = None,
    n_total_over_active: Experts = 64.0,
    front: Annotated[
        Path | None,
        typer.Option(help="Also the plans of smaller budgets: a table, and a plot into this PNG."),
    ] = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="Also the plan of this kind of attention at the same budget; may be repeated: a table. "
            "KIND, or KIND,window_tokens=512,features.count=128."
        ),
    ] = None,
    workers: Workers = False,
    max_workers: MaxWorkers = None,
    seal: Annotated[
        bool, typer.Option("--seal", help="Seal what the law says of the planned run. [always with --submit]")
    ] = False,
    submit: Submit = False,
    refresh: Refresh = False,
    json: Json = False,
) -> None:
    """Spend a budget on parameters and tokens so that the law's loss is lowest; several limits at once."""
    from escala.planning.limits import Limits
    from escala.planning.plans import PlanOptions

    escala = open_home()
    options = PlanOptions(
        kappa, context_tokens, cluster, render_plans.precision(precision), max_memory_gb, refresh
    )
    if target_loss is not None:
        if any(v is not None for v in (compute_flops, usd, hours, kwh)):
            raise LawError("--target-loss asks for the budget.", "Leave the budgets out.")
        if attention:
            raise LawError("--attention compares plans of one budget.", "Give a budget, not --target-loss.")
        target = escala.plan_target(law, target_loss, options)
        if target.wall_seconds is not None:  # there is a cluster
            target = escala.plan_workers(target, options, max_workers)
        render_plans.target(target, json, workers)
        best: PlanView = target
    else:
        limits = Limits(
            compute_flops=compute_flops,
            usd=usd,
            hours=hours,
            kwh=kwh,
            max_params=max_params,
            data_tokens=data_tokens,
            inference_tokens=inference_tokens,
            max_context_tokens=max_context_tokens,
            n_total_over_active=n_total_over_active,
        )
        best = escala.plan_law(law, limits, options)
        if front is not None:
            with progress.working("planning smaller budgets", quiet=json):
                smaller = escala.plan_front(law, limits, options, front)
            best = best.model_copy(update={"front": tuple(smaller), "front_plot": str(front)})
        if attention:
            kinds = escala.plan_kinds(law, limits, attention, options)
            best = best.model_copy(update={"kinds": tuple(kinds)})
        if best.wall_seconds is not None:  # there is a cluster
            best = escala.plan_workers(best, options, max_workers)
        render_plans.plan(best, json, workers)
    if seal and not submit:
        with progress.reporting("sealing", json) as report:
            made = escala.seal_plan(*_run(best.law, best), report=report, context_tokens=best.context_tokens)
        render_forecasts.sealed(made)
    if submit:
        with progress.reporting("submitting", json) as report:
            job = escala.submit_run(*_run(best.law, best), report=report, context_tokens=best.context_tokens)
        render.submitted(job, json)


def propose(
    law: Name,
    target_flops: Annotated[
        float | None, typer.Option(help="The budget whose optimum is to be known better.")
    ] = None,
    max_flops: Annotated[float | None, typer.Option(help="Of one run.")] = None,
    pool: PoolFile = None,
    targets: Targets = None,
    cost: CostColumn = None,
    aim: Annotated[str, typer.Option(help="loss: the mean loss there; n_active: the optimal N.")] = "loss",
    count: Annotated[int, typer.Option(help="Runs, each as if those before had been measured.")] = 1,
    unit: Annotated[str, typer.Option(help="What a run costs: FLOP, USD or kWh.")] = "FLOP",
    width: Annotated[
        float | None, typer.Option(help="The relative width wanted in the end. [default: half of now]")
    ] = None,
    cluster: ClusterName = None,
    precision: Precision = "bf16",
    max_params: MaxParams = None,
    max_memory_gb: MaxMemory = None,
    data_tokens: DataTokens = None,
    inference_tokens: InferenceTokens = None,
    kappa: Kappa = 6.0,
    context_tokens: ContextTokens = None,
    max_context_tokens: MaxContextTokens = None,
    n_total_over_active: Experts = 64.0,
    submit: Submit = False,
    follow: Follow = False,
    refresh: Refresh = False,
    json: Json = False,
) -> None:
    """Propose the next run: the one that tells most of a larger one per FLOP, dollar or kWh.

    The larger one is that of `escala laws plan` at the same budget and limits. With --pool: the next rows of a table.
    """
    from escala.planning.limits import Limits
    from escala.planning.plans import PlanOptions

    without = {"--target-flops": target_flops, "--max-flops": max_flops}
    _check_pool(pool, {"--cost": cost}, {"--targets": targets}, without)
    target = Limits(
        compute_flops=target_flops,
        max_params=max_params,
        data_tokens=data_tokens,
        inference_tokens=inference_tokens,
        max_context_tokens=max_context_tokens,
        n_total_over_active=n_total_over_active,
    )
    options = PlanOptions(
        kappa, context_tokens, cluster, render_plans.precision(precision), max_memory_gb, refresh
    )
    escala = open_home()
    if pool is not None:
        _refuse_with_pool(
            {"--submit": submit, "--follow": follow, "--max-flops": max_flops, "--width": width}
        )
        rows = escala.propose_rows(
            law,
            pool,
            str(cost),
            targets=targets,
            target=None if target_flops is None else target,
            options=options,
            count=count,
        )
        render_plans.pool_rows(rows, json)
        return
    with progress.working("weighing the candidates", quiet=json):
        found = escala.propose_runs(
            law,
            target,
            float(max_flops or 0),
            options,
            aim=aim,
            count=count,
            unit=unit,
            width=width,
        )
    render_plans.proposals(found, json)
    if submit:
        with progress.reporting("submitting", json) as report:
            started = [
                escala.submit_run(*_run(found.law, p), report=report, context_tokens=p.context_tokens)
                for p in found.proposals
            ]
        for job in started:
            render.submitted(job, json)
        for job in started if follow else ():
            follow_job(escala, job.id, json)


def explore(
    law: Annotated[
        str | None, typer.Argument(help="NAME@VERSION, or NAME for its champion; none with --pool.")
    ] = None,
    target_flops: Annotated[
        float | None, typer.Option(help="The budget whose optimum is to be known better.")
    ] = None,
    max_flops: Annotated[float | None, typer.Option(help="Of one run.")] = None,
    budget_flops: Annotated[float | None, typer.Option(help="Of all runs together: a hard bound.")] = None,
    pool: PoolFile = None,
    targets: Targets = None,
    cost: CostColumn = None,
    form: Annotated[str, typer.Option(help="With --pool: the law's form.")] = "nd",
    budget: Annotated[
        float | None, typer.Option(help="With --pool: of all chosen rows, in the unit of --cost.")
    ] = None,
    seed: Annotated[int, typer.Option(help="With --pool: kept in the answer; nothing is random.")] = 0,
    width: Annotated[
        float, typer.Option(help="Stop when the 90 % interval of the mean loss is so wide, relatively.")
    ] = 0.02,
    batch: Annotated[int, typer.Option(help="Runs between two fits.")] = 2,
    cluster: ClusterName = None,
    precision: Precision = "bf16",
    max_params: MaxParams = None,
    max_memory_gb: MaxMemory = None,
    data_tokens: DataTokens = None,
    inference_tokens: InferenceTokens = None,
    kappa: Kappa = 6.0,
    context_tokens: ContextTokens = None,
    max_context_tokens: MaxContextTokens = None,
    n_total_over_active: Experts = 64.0,
    json: Json = False,
) -> None:
    """Propose, run, refit, until the interval is narrow or the budget spent. Started again, it goes on.

    With --pool: replay a table instead, without a law and without a cluster; a row's loss is read once it is chosen.
    """
    without = {"LAW": law, "--target-flops": target_flops, "--max-flops": max_flops}
    without["--budget-flops"] = budget_flops
    needed = {"--targets": targets, "--cost": cost, "--budget": budget}
    _check_pool(pool, needed, {}, without)
    if pool is not None:
        _refuse_with_pool(without)
        found = open_home().explore_pool(
            pool, Path(str(targets)), str(cost), float(budget or 0), form=form, seed=seed
        )
        render_plans.pool_exploration(found, json)
        return
    from escala.planning.limits import Limits
    from escala.planning.plans import PlanOptions

    target = Limits(
        compute_flops=target_flops,
        max_params=max_params,
        data_tokens=data_tokens,
        inference_tokens=inference_tokens,
        max_context_tokens=max_context_tokens,
        n_total_over_active=n_total_over_active,
    )
    options = PlanOptions(kappa, context_tokens, cluster, render_plans.precision(precision), max_memory_gb)
    escala, last = open_home(), None
    with progress.reporting("exploring", json) as report:
        for last in escala.explore(
            str(law),
            target,
            float(max_flops or 0),
            float(budget_flops or 0),
            options,
            width=width,
            batch=batch,
            report=report,
        ):
            if not json:
                render_plans.round_(last)
    render_plans.exploration(last, json)


def _run(law: str, point: PlanView | ProposalView) -> tuple[str, float, float, float]:
    """What a planned run is asked by: law, N active, N total, D."""
    return law, point.n_active, point.n_total, point.tokens


def _check_pool(
    pool: Path | None,
    needed: Mapping[str, object],
    optional: Mapping[str, object],
    needed_without: Mapping[str, object],
) -> None:
    """Raises LawError where an option of the asked kind is missing, or one of --pool stands without it."""
    wanted = needed if pool is not None else needed_without
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        kind = "with --pool" if pool is not None else "without --pool"
        raise LawError(f"{', '.join(missing)} is missing ({kind}).", "See --help.")
    alone = [name for name, value in {**needed, **optional}.items() if value is not None]
    if pool is None and alone:
        raise LawError(f"{', '.join(alone)} belongs to --pool.", "Give --pool POOL.csv, or leave it out.")


def _refuse_with_pool(given: Mapping[str, object]) -> None:
    """Raises LawError for what has no meaning for the rows of a table."""
    found = [name for name, value in given.items() if value]
    if found:
        raise LawError(f"{', '.join(found)} does not go with --pool.", "Leave it out, or leave out --pool.")
