"""Jobs from what a user writes: a spec, or a budget that the recipe and a law turn into one; checked, then queued."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala import preflight, spec
from escala.contract.errors import SpecError
from escala.jobs.actions import start
from escala.jobs.attention import resolve_attention
from escala.jobs.references import resolve_jobs
from escala.report import Report, silent
from escala.schema.workloads import get_workload
from escala.settings import Settings

if TYPE_CHECKING:
    from escala.jobs.records import Job
    from escala.laws.forecasts import Forecast


@dataclass(frozen=True)
class JobRequest:
    """What a user asks for.

    Args:
        workload, files, overrides, options: see `spec.load_job`.
        compute_flops: the one dial: model, tokens, batch and learning rate follow from it by recipe, where files and
            overrides do not fix them.
        law: whose optimum splits `compute_flops` into N and D; None: 20 tokens per parameter.
        base: a configuration to start from, instead of the defaults.
        seal: what `law` says of the run is sealed before that is queued (laws.forecasts).
        cluster: whose table of attention `model.attention: auto` follows; None: ESCALA_CLUSTER.
        code: the directory of the user's modules (reward functions); None: the present one, where they are in it. They
            are copied into the home.
    """

    workload: str
    files: Iterable[str | Path] = ()
    overrides: Iterable[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    compute_flops: float | None = None
    law: str | None = None
    base: Mapping[str, Any] | None = None
    code: str | Path | None = None
    seal: bool = False
    cluster: str | Path | None = None


def resolve(settings: Settings, asked: JobRequest) -> spec.Resolved:
    """The spec in full and what it costs; starts nothing. Raises as `submit`."""
    loaded = _load(settings, asked)
    _ready(settings, loaded, asked.code, keep=False)
    return spec.resolve(loaded)


def submit(settings: Settings, asked: JobRequest, report: Report = silent) -> Job:
    """Check a job, bring the cluster up where none is configured, and queue the job.

    Raises SpecError, LawError or NotFoundError, and as `jobs.actions.enqueue`: where something is raised nothing is
    queued. A cluster that cannot be brought up is a warning of the logger `escala.jobs`, and the job stays queued.
    """
    loaded = _load(settings, asked)
    code = _ready(settings, loaded, asked.code)
    if asked.seal:
        _seal(settings, asked.law, loaded, report)
    return start(settings, loaded, report, code=code)


def submit_run(
    settings: Settings,
    law: str,
    n_active: float,
    n_total: float,
    tokens: float,
    overrides: Iterable[str] = (),
    report: Report = silent,
    context_tokens: float | None = None,
) -> Job:
    """Queue a run of N and D (and T, of a law of it) configured like the law's runs, once what the law says is sealed.

    Raises SpecError for a law that knows no configuration, ClusterError where the forecast cannot be sealed.
    """
    job = _planned_job(settings, law, n_active, n_total, tokens, overrides, context_tokens)
    _seal(settings, law, job, report)
    return start(settings, job, report)


def seal_plan(
    settings: Settings,
    law: str,
    n_active: float,
    n_total: float,
    tokens: float,
    report: Report = silent,
    context_tokens: float | None = None,
) -> Forecast:
    """Seal what a law says of the run of N and D that `submit_run` would queue. Raises as that."""
    job = _planned_job(settings, law, n_active, n_total, tokens, context_tokens=context_tokens)
    return _seal(settings, law, job, report)


def _planned_job(
    settings: Settings,
    law: str,
    n_active: float,
    n_total: float,
    tokens: float,
    overrides: Iterable[str] = (),
    context_tokens: float | None = None,
) -> spec.JobSpec:
    from escala.laws import queries
    from escala.planning.plans import config_for

    stored = queries.law(settings, law)
    config = config_for(stored, n_active, n_total, tokens, tuple(overrides), context_tokens)
    return spec.load_job("pretrain", base=config, options={"name": law.replace("@", "-")})


def _seal(settings: Settings, law: str | None, job: spec.JobSpec, report: Report) -> Forecast:
    from escala.laws import queries
    from escala.laws.forecasts import seal_runs

    if law is None:
        raise SpecError("--seal seals what a law says, and no law is given", "add --law NAME")
    if not job.kind.chooses_model or job.kind.objective is None or not job.kind.objective.fits_laws:
        raise SpecError(f"a law says nothing of a {job.workload} run", "leave --seal out")
    name = job.options.name or job.workload
    return seal_runs(settings, queries.law(settings, law), [(name, job.plain())], report)[0]


def _ready(settings: Settings, job: spec.JobSpec, code: str | Path | None, keep: bool = True) -> str | None:
    """What can be known before it is queued, checked; the digest of the user's modules."""
    waits = job.options.after is not None
    return preflight.ready(job.kind.inputs, job.plain(), settings.home, code, waits, keep)


def _load(settings: Settings, asked: JobRequest) -> spec.JobSpec:
    written = spec.written(asked.files, asked.overrides, asked.base)
    written, options = resolve_jobs(settings, written, dict(asked.options))
    written, chosen = resolve_attention(settings, written, cluster=asked.cluster)
    return replace(_checked(settings, asked, written, options), chosen=chosen)


def _checked(
    settings: Settings, asked: JobRequest, written: Mapping[str, Any], options: Mapping[str, Any]
) -> spec.JobSpec:
    """The job of a spec that leaves nothing but the budget's split to be decided."""
    workload, compute_flops, law = asked.workload, asked.compute_flops, asked.law
    if compute_flops is None:
        if law is not None and not asked.seal:
            raise SpecError(
                f"--law {law} splits a budget, and none is given",
                "add --compute-flops, e.g. 1e18; or --seal, to seal what the law says of this run",
            )
        return spec.load_job(workload, options=options, base=written)
    if not get_workload(workload).chooses_model:
        raise SpecError(
            f"--compute-flops chooses a model, and {workload} starts from one",
            "give training.train_tokens or training.steps",
        )
    from escala.sweeps.recipes import by_recipe

    axes = {"compute_flops": compute_flops}
    if law is not None:
        from escala.planning.limits import Limits
        from escala.planning.plans import PlanOptions, plan_law

        plan_options = PlanOptions(context_tokens=_context(written))
        limits = Limits(compute_flops=compute_flops)
        plan = plan_law(settings, law, limits, plan_options).plan
        axes["n_total"] = plan.n_total
        if plan_options.context_tokens is None and plan.context_tokens is not None:
            axes["context_tokens"] = round(plan.context_tokens)
    return spec.load_job(workload, options=options, base=spec.merge(by_recipe(written, axes), written))


def _context(written: Mapping[str, Any]) -> float | None:
    """The context length that a spec states; None where it leaves it to the defaults."""
    stated: float | None = written.get("training", {}).get("context_tokens")
    return stated or written.get("model", {}).get("max_context_tokens")
