"""Costs and plans as text and JSON, with the tables of render.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from escala.cli import render_workers
from escala.cli.render import as_json, duration, note, number, pairs, raw, table
from escala.cli.render_laws import caveats, interval
from escala.contract.errors import SpecError

if TYPE_CHECKING:
    from escala.schema.hardware import Cluster, Precision
    from escala.views.costs import CostView, ResolvedSpecView
    from escala.views.plans import (
        ExplorationView,
        ObtainedView,
        PlanView,
        PoolExplorationView,
        PoolProposalsView,
        ProposalsView,
        TargetView,
    )

GB = 1e9
ROUNDING = 1e-9  # relative


def resolved(answer: ResolvedSpecView, json: bool) -> None:
    """The spec in full, what was derived, what it costs."""
    from escala import documents

    if json:
        as_json(answer)
        return
    raw(documents.dump(answer.spec).rstrip())
    raw("\nderived")
    pairs(answer.derived)
    raw("\ncost")
    cost(answer.cost, json)


def cost(found: CostView, json: bool, workers: bool = False) -> None:
    """A run's cost on a cluster; `workers`: with the table over their number."""
    if json:
        as_json(found)
        return
    cluster, memory, moved = found.cluster, found.memory_bytes, found.communication
    limit = cluster.device.memory_bytes.value
    parts = ("weights", "gradients", "optimizer", "buckets", "activations", "runtime")
    listed = ", ".join(f"{name} {number(getattr(memory, name) / GB)}" for name in parts)
    raw(
        f"parameters      {number(found.n_total)}"
        + ("" if found.n_active == found.n_total else f" ({number(found.n_active)} active)")
    )
    raw(f"tokens          {number(found.train_tokens)} in {number(found.steps)} steps")
    raw(f"FLOPs           {number(found.compute_flops)}")
    raw(
        f"memory          {number(memory.total / GB)} GB a device of {number(limit / GB)}: {listed}"
        + ("" if found.fits else "  DOES NOT FIT")
    )
    grows, own = found.kv_cache_bytes_per_token, found.contexts[0]
    raw(f"attention       {found.attention}, chi {number(own.chi)} at {number(own.context_tokens)} tokens")
    raw(
        f"KV cache        {number(grows / 1e3)} kB a token in generation"
        if grows
        else f"KV cache        {number(found.contexts[-1].state / 1e6)} MB a sequence in generation, however long it is"
    )
    raw(f"communication   {number(moved.sent_bytes / GB)} GB a device and step, {moved.messages} messages")
    raw(
        f"time            {duration(found.wall_seconds)} at {number(found.step_seconds)} s a step "
        f"(compute {number(found.compute_seconds)}, exposed communication {number(found.exposed_seconds)}), "
        f"MFU {found.model_flops_utilization:.0%}"
    )
    raw(f"energy          {_energy(found.energy_joules)}")
    raw(f"carbon          {_unknown(found.carbon_gco2e, 'g CO2e', 'gco2e_per_kwh')}")
    raw(f"money           {_unknown(found.cost_usd, 'USD', 'usd_per_device_hour')}")
    raw(f"cluster         {cluster.devices} devices: {cluster.about}")
    for line in found.notes:
        raw(f"note            {line}")
    raw("\nmemory of one sequence, in GB")
    columns = ("context", "chi", "activations", "checkpointed", "logits", "generation's state")
    names = ("activations", "checkpointed", "logits", "state")
    rows = [
        (number(c.context_tokens), number(c.chi), *(number(getattr(c, name) / GB) for name in names))
        for c in found.contexts
    ]
    table(columns, rows)
    raw("")
    render_workers.line(found.workers)
    if workers:
        render_workers.curve(found.workers)


def precision(text: str) -> Precision:
    """The option's value. Raises SpecError."""
    if text not in ("fp32", "bf16"):
        raise SpecError(f"there is no precision {text!r}", "fp32 or bf16")
    return "fp32" if text == "fp32" else "bf16"


def plan(best: PlanView, json: bool, workers: bool = False) -> None:
    """The best split of a budget; `workers`: with the table over their number."""
    if json:
        as_json(best)
        return
    _split(best)
    if best.inference_flops:
        raw(
            f"inference       {number(best.inference_flops)} FLOPs beside {number(best.compute_flops)} of training"
        )
    if best.epochs > 1:
        raw(
            f"repeats         {number(best.epochs)} epochs, worth {number(best.effective_tokens)} unique tokens"
        )
    known = [
        f"{value} {unit}" for unit, value in zip(("hours", "USD", "kWh"), _spent(best), strict=True) if value
    ]
    if known:
        raw(f"spends          {', '.join(known)}")
    render_workers.planned(best, workers)
    raw(f"binding         {', '.join(best.binding)}")
    if best.residuals:
        raw(f"residuals       {_residuals(best)}")
    _caveats(best)
    if best.front is not None:
        _front(best.front, best.front_plot)
    if best.kinds is not None:
        _kinds(best, best.kinds)
    if workers and best.workers:
        render_workers.curve(best.workers[0])


def target(found: TargetView, json: bool, workers: bool = False) -> None:
    """The least compute that reaches a loss; `workers`: with the table over their number and the precision."""
    if json:
        as_json(found)
        return
    _split(found)
    ends = interval(found.compute_low_flops, found.compute_high_flops, "90 % interval")
    raw(f"compute         {number(found.compute_flops)} FLOPs  ({ends})")
    if found.energy_joules is not None:
        ends = interval(found.energy_low_joules, found.energy_high_joules, "90 % interval of the tokens")
        raw(f"energy          {number(found.energy_joules)} J  ({ends})")
    render_workers.planned(found, workers)
    if found.reached is not None and found.reached < 1:
        raw(f"note            {1 - found.reached:.0%} of the law's replicates never reach this loss")
    _caveats(found)
    if workers and found.workers:
        render_workers.by_precision(found.workers)


def _split(best: PlanView) -> None:
    size = interval(best.n_active_low, best.n_active_high, "90 % interval")
    loss = interval(best.low_nats, best.high_nats, "90 % predictive interval")
    raw(f"N active        {number(best.n_active)}  ({size})")
    if best.n_total != best.n_active:
        raw(f"N total         {number(best.n_total)}")
    raw(f"tokens          {number(best.tokens)}  ({number(best.tokens_per_parameter)} per active parameter)")
    if best.context_tokens is not None:
        ends = interval(best.context_tokens_low, best.context_tokens_high, "90 % interval")
        chosen = "" if best.context_tokens_low is None else f"  ({ends})"
        raw(f"context         {number(best.context_tokens)} tokens{chosen}")
        raw(f"attention       {best.attention}, chi {number(best.chi)}{_memory(best)}")
    raw(f"loss            {number(best.loss_nats)} nats per token  ({loss})")


def _caveats(best: PlanView) -> None:
    for text in best.advice:
        raw(f"advice          {text}")
    caveats(best)


def _spent(best: PlanView) -> tuple[str | None, str | None, str | None]:
    """Hours, dollars, kWh, as text; None where it is not known."""
    hours = None if best.wall_seconds is None else best.wall_seconds / 3600
    kwh = None if best.energy_joules is None else best.energy_joules / 3.6e6
    known = (None if value is None else number(value) for value in (hours, best.cost_usd, kwh))
    return next(known), next(known), next(known)


def _front(plans: Sequence[PlanView], plot: str | None) -> None:
    """The Pareto front of loss against what is spent."""
    raw("")
    columns = ("FLOPs", "N", "tokens", "loss", "90 % from", "to", "hours", "USD", "kWh")
    rows = [
        (
            number(p.compute_flops + p.inference_flops),
            number(p.n_active),
            number(p.tokens),
            *(number(x) for x in (p.loss_nats, p.low_nats, p.high_nats)),
            *(text or "" for text in _spent(p)),
        )
        for p in plans
    ]
    table(columns, rows)
    raw(str(plot))


def _memory(best: PlanView) -> str:
    """What is known of it, to go behind something."""
    known = (
        ("GB a device in training", best.memory_bytes),
        ("GB a sequence in generation", best.state_bytes),
    )
    return "".join(f", {number(size / GB)} {of}" for of, size in known if size is not None)


def _residuals(best: PlanView) -> str:
    """The size of the relative first-order residuals; below ROUNDING the digits are the machine's."""
    return ", ".join(
        f"{name} {abs(residual):.1e}" if abs(residual) >= ROUNDING else f"{name} below {ROUNDING:.0e}"
        for name, residual in best.residuals.items()
    )


def _kinds(best: PlanView, plans: Sequence[PlanView]) -> None:
    """Plans of the same budget with other kinds of attention, and what is assumed of each beside what `best` says."""
    raw("")
    columns = ("attention", "T", "N", "tokens", "loss", "90 % from", "to", "chi", "GB training", "GB state")
    rows = [
        (
            str(p.attention),
            number(p.context_tokens),
            number(p.n_active),
            number(p.tokens),
            *(number(x) for x in (p.loss_nats, p.low_nats, p.high_nats, p.chi)),
            *("" if x is None else number(x / GB) for x in (p.memory_bytes, p.state_bytes)),
        )
        for p in plans
    ]
    table(columns, rows)
    for p in plans:
        raw(f"{p.attention}: binding {', '.join(p.binding)}; residuals {_residuals(p) or 'none'}")
        for text in p.assumed:
            if text not in best.assumed:
                raw(f"  {text}")


def proposals(found: ProposalsView, json: bool) -> None:
    """Runs to make next."""
    if json:
        as_json(found)
        return
    columns = (
        "N active",
        "tokens",
        "FLOPs",
        "cost",
        "information",
        "width now",
        "expected",
        "loss",
        "90 % from",
        "to",
    )
    rows = [
        (
            number(p.n_active),
            number(p.tokens),
            number(p.compute_flops),
            f"{number(p.cost)} {p.unit}",
            f"{number(p.information_nats)} nats",
            f"{p.width_now:.2%}",
            f"{p.width_expected:.2%}",
            *(number(x) for x in (p.loss_nats, p.low_nats, p.high_nats)),
        )
        for p in found.proposals
    ]
    table(columns, rows)
    raw("")
    if found.target is not None:
        best = found.target
        raw(f"target          N {number(best.n_active)}, tokens {number(best.tokens)}: what `laws plan` says")
    raw("widths          of the 90 % interval of the mean at the target, relative")
    raw(f"method          {found.method}")
    raw(f"law             {found.law}, {'healthy' if found.healthy else 'NOT HEALTHY'}")


def pool_rows(found: PoolProposalsView, json: bool) -> None:
    """Rows of a pool to buy next."""
    if json:
        as_json(found)
        return
    rows = [(str(r.row), number(r.cost), f"{r.expected_error:.2%}") for r in found.rows]
    table(("row", "cost", "expected error"), rows)
    raw("\nexpected error   of the fit at the targets, relative, after this row and those before it")
    raw(f"law             {found.law}, {'healthy' if found.healthy else 'NOT HEALTHY'}")


def pool_exploration(found: PoolExplorationView, json: bool) -> None:
    """What was bought from a pool, and the law of it."""
    if json:
        as_json(found)
        return
    raw(f"chosen          {len(found.chosen)} rows: {', '.join(map(str, found.chosen))}")
    raw(f"spent           {number(found.spent)} of {number(found.budget)}")
    raw(f"law             {found.law.formula}")
    pairs({name: number(value) for name, value in found.law.parameters.items()})
    for each in found.law.findings:
        raw(f"finding         {each}")
    raw(f"expected error  {found.expected_error:.2%} at the targets, root mean square")
    table(("target", "loss"), [(str(i), number(loss)) for i, loss in enumerate(found.predictions)])


def round_(state: ExplorationView) -> None:
    """The round that has just ended: what was expected, what was obtained."""
    last = state.rounds[-1]
    for each in last.obtained or ():
        raw(
            f"round {len(state.rounds)}: N {number(each.n_active)}, tokens {number(each.tokens)}: expected "
            f"{number(each.loss_nats)} ({number(each.low_nats)} to {number(each.high_nats)}), "
            f"obtained {number(each.obtained_loss_nats)}, {_inside(each)}"
        )
    for refused in last.refused or ():
        raw(f"round {len(state.rounds)}: {refused.name}: {refused.reason}")
    expected = last.proposals[-1].width_expected
    obtained = "none" if last.width_obtained is None else f"{last.width_obtained:.2%}"
    raw(f"  {last.fitted}: width expected {expected:.2%}, obtained {obtained}")


def exploration(state: ExplorationView | None, json: bool) -> None:
    """The end of an exploration; None: there was nothing to do."""
    if json:
        as_json(state)
    elif state is None:
        raw("nothing to do: the interval is narrow enough, or no run fits in the budget")
    else:
        raw(
            f"spent {number(state.spent_flops)} of {number(state.budget_flops)} FLOPs in {len(state.rounds)} rounds"
        )


def device(cluster: Cluster, path: Path, json: bool) -> None:
    """A measured device."""
    if json:
        as_json(cluster)
        return
    found = cluster.device
    for precision, peak in found.peak_flops_per_second.items():
        speed = (found.training or {}).get(precision)
        widths = ", ".join(f"{number(v / 1e9)} at {w}" for w, v in speed.block.items()) if speed else "-"
        raw(
            f"{precision}            peak {number(peak.value / 1e9)} GFLOP/s; blocks by d_model: {widths} GFLOP/s"
        )
    raw(
        f"memory          {number(found.memory_bytes.value / GB)} GB, "
        f"{number(found.memory_bytes_per_second.value / GB)} GB/s"
    )
    if found.link_bytes_per_second is not None and found.link_seconds is not None:
        link, latency = found.link_bytes_per_second.value, found.link_seconds.value
        raw(f"link            {number(link / GB)} GB/s, {number(latency * 1e3)} ms")
    raw(f"written to      {path}")


def attention(cluster: Cluster, path: Path, json: bool) -> None:
    """Milliseconds of each kind of attention by context, and where it overtakes exact."""
    if json:
        as_json(cluster)
        return
    for precision, found in cluster.device.attention.items():
        contexts = sorted({t for kind in found.kinds.values() for t in (*kind.train, *kind.decode)})
        raw(
            f"{precision}, {found.heads} heads of {found.head_size}, window {found.window_tokens}, "
            f"{found.features} features: ms by T"
        )
        rows = [
            (name, side, *(_ms(seconds.get(t)) for t in contexts), number(overtakes))
            for name, kind in found.kinds.items()
            for side, seconds, overtakes in (
                ("forward", kind.forward, None),
                ("train", kind.train, kind.train_overtakes),
                ("decode", kind.decode, kind.decode_overtakes),
            )
        ]
        table(("kind", "", *map(str, contexts), "overtakes exact at"), rows)
        for name, kind in found.kinds.items():
            for reason in kind.left_out:
                note(f"{name} {reason}")
    raw(f"written to      {path}")


def _ms(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1e3)


def _inside(run: ObtainedView) -> str:
    """Whether what a run obtained is within what was predicted, in words."""
    if run.low_nats is None or run.high_nats is None:
        return "no interval"
    return "inside" if run.low_nats <= run.obtained_loss_nats <= run.high_nats else "OUTSIDE"


def _energy(joules: float | None) -> str:
    if joules is None:
        return "unknown: the cluster's file lacks static_watts, joules_per_flop or joules_per_byte"
    return f"{number(joules)} J, an estimate ({number(joules / 3.6e6)} kWh)"


def _unknown(value: float | None, unit: str, key: str) -> str:
    return f"unknown: the cluster's file lacks {key}" if value is None else f"{number(value)} {unit}"
