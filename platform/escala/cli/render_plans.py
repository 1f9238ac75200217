"""Costs and plans as text and JSON. With render.py, whose tables it uses, a module that prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala.cli.render import as_json, duration, number, pairs, raw, table
from escala.cli.render_laws import caveats, interval
from escala.contract.errors import SpecError

if TYPE_CHECKING:
    from escala.hardware import Cluster, Precision
    from escala.planning.cost import Cost
    from escala.planning.explore import Exploration
    from escala.planning.plan import Plan, Target
    from escala.planning.plans import Planned, Proposed
    from escala.spec import Resolved

GB = 1e9


def resolved(answer: Resolved, found: Cost, cluster: Cluster, json: bool) -> None:
    """The spec in full, what was derived, what it costs."""
    from escala import documents

    options = answer.spec.options.model_dump(mode="json")
    spec = {"workload": answer.spec.workload, "job": options, **answer.spec.plain()}
    if json:
        as_json({"spec": spec, "derived": answer.derived, "cost": _plain(found)})
        return
    raw(documents.dump(spec).rstrip())
    raw("\nderived")
    pairs(answer.derived)
    raw("\ncost")
    cost(found, cluster, json)


def cost(found: Cost, cluster: Cluster, json: bool) -> None:
    """A run's cost on a cluster."""
    if json:
        as_json({**_plain(found), "cluster": cluster.model_dump()})
        return
    memory, moved, limit = found.memory, found.communication, cluster.device.memory_bytes.value
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
    raw(f"KV cache        {number(found.kv_cache_bytes_per_token / 1e3)} kB a token in generation")
    raw(f"communication   {number(moved.sent_bytes / GB)} GB a device and step, {moved.messages} messages")
    raw(
        f"time            {duration(found.wall_seconds)} at {number(found.step_seconds)} s a step "
        f"(compute {number(found.compute_seconds)}, exposed communication {number(found.exposed_seconds)}), "
        f"MFU {found.model_flops_utilization:.0%}"
    )
    raw(f"energy          {_energy(found.energy_joules)}")
    raw(f"carbon          {_unknown(found.gco2e, 'g CO2e', 'gco2e_per_kwh')}")
    raw(f"money           {_unknown(found.usd, 'USD', 'usd_per_device_hour')}")
    raw(f"cluster         {cluster.devices} devices: {cluster.about}")
    for note in found.notes:
        raw(f"note            {note}")


def precision(text: str) -> Precision:
    """The option's value. Raises SpecError."""
    if text not in ("fp32", "bf16"):
        raise SpecError(f"there is no precision {text!r}", "fp32 or bf16")
    return "fp32" if text == "fp32" else "bf16"


def plan(planned: Planned, json: bool) -> None:
    """The best split of a budget."""
    if json:
        as_json(planned.plain())
        return
    _split(planned.plan)
    best = planned.plan
    if best.inference_flops:
        raw(
            f"inference       {number(best.inference_flops)} FLOPs beside {number(best.compute_flops)} of training"
        )
    if best.epochs > 1:
        raw(
            f"repeats         {number(best.epochs)} epochs, worth {number(best.effective_tokens)} unique tokens"
        )
    known = (("hours", best.hours), ("USD", best.usd), ("kWh", best.kwh))
    if any(value is not None for _, value in known):
        raw("spends          " + ", ".join(f"{number(v)} {unit}" for unit, v in known if v is not None))
    raw(f"binding         {', '.join(best.binding)}")
    _caveats(planned)


def target(planned: Planned, found: Target, json: bool) -> None:
    """The least compute that reaches a loss."""
    if json:
        as_json(
            {
                **planned.plain(),
                "compute_low_flops": found.compute_low_flops,
                "compute_high_flops": found.compute_high_flops,
                "reached": found.reached,
                "joules": _joules(planned, found),
            }
        )
        return
    _split(planned.plan)
    ends = interval(found.compute_low_flops, found.compute_high_flops, "90 % interval")
    raw(f"compute         {number(planned.plan.compute_flops)} FLOPs  ({ends})")
    joules = _joules(planned, found)
    if joules is not None:
        low, value, high = joules
        raw(f"energy          {number(value)} J  ({interval(low, high, '90 % interval of the tokens')})")
    if found.reached is not None and found.reached < 1:
        raw(f"note            {1 - found.reached:.0%} of the law's replicates never reach this loss")
    _caveats(planned)


def _joules(planned: Planned, found: Target) -> tuple[float | None, float, float | None] | None:
    """Joules per token times D* (SPEC.md E.5), with D*'s interval; None where the cluster's energy is unknown."""
    best = planned.plan
    if best.kwh is None:
        return None
    per_token = best.kwh * 3.6e6 / best.tokens
    low, high = (None if t is None else per_token * t for t in (best.tokens_low, best.tokens_high))
    return low, per_token * best.tokens, high


def _split(best: Plan) -> None:
    size = interval(best.n_active_low, best.n_active_high, "90 % interval")
    loss = interval(best.low_nats, best.high_nats, "90 % predictive interval")
    raw(f"N active        {number(best.n_active)}  ({size})")
    if best.n_total != best.n_active:
        raw(f"N total         {number(best.n_total)}")
    raw(f"tokens          {number(best.tokens)}  ({number(best.tokens_per_parameter)} per active parameter)")
    if best.context_tokens is not None:
        raw(f"context         {number(best.context_tokens)} tokens")
    raw(f"loss            {number(best.loss_nats)} nats per token  ({loss})")


def _caveats(planned: Planned) -> None:
    for text in planned.plan.advice:
        raw(f"advice          {text}")
    caveats(planned.law, planned.plan.extrapolation, planned.assumed)


def front(plans: Sequence[Plan], path: Path, json: bool) -> None:
    """The Pareto front of loss against what is spent."""
    if json:
        as_json([asdict(each) for each in plans])
        return
    raw("")
    columns = ("FLOPs", "N", "tokens", "loss", "90 % from", "to", "hours", "USD", "kWh")
    rows = [
        (
            number(p.compute_flops + p.inference_flops),
            number(p.n_active),
            number(p.tokens),
            *(number(x) for x in (p.loss_nats, p.low_nats, p.high_nats)),
            *("" if x is None else number(x) for x in (p.hours, p.usd, p.kwh)),
        )
        for p in plans
    ]
    table(columns, rows)
    raw(str(path))


def proposals(found: Proposed, json: bool) -> None:
    """Runs to make next."""
    if json:
        as_json(
            {
                "law": found.law.reference,
                "method": found.method,
                "proposals": [asdict(p) for p in found.proposals],
            }
        )
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
            *(number(x) for x in (p.predicted_loss_nats, p.low_nats, p.high_nats)),
        )
        for p in found.proposals
    ]
    table(columns, rows)
    raw("\nwidths          of the 90 % interval of the mean at the target, relative")
    raw(f"method          {found.method}")
    raw(f"law             {found.law.reference}, {'healthy' if found.law.law.healthy else 'NOT HEALTHY'}")


def round_(state: Exploration) -> None:
    """The round that has just ended: what was expected, what was obtained."""
    last = state.rounds[-1]
    for each in last.obtained or ():
        low, high = each["low"], each["high"]
        inside = "no interval" if low is None else "inside" if low <= each["obtained"] <= high else "OUTSIDE"
        raw(
            f"round {len(state.rounds)}: N {number(each['n_active'])}, tokens {number(each['tokens'])}: expected "
            f"{number(each['predicted'])} ({number(each['low'])} to {number(each['high'])}), "
            f"obtained {number(each['obtained'])}, {inside}"
        )
    for each in last.refused or ():
        raw(f"round {len(state.rounds)}: {each['name']}: {each['reason']}")
    expected = last.proposals[-1]["width_expected"]
    obtained = "none" if last.width_obtained is None else f"{last.width_obtained:.2%}"
    raw(f"  {last.fitted}: width expected {expected:.2%}, obtained {obtained}")


def exploration(state: Exploration | None, json: bool) -> None:
    """The end of an exploration; None: there was nothing to do."""
    if state is None:
        raw("nothing to do: the interval is narrow enough, or no run fits in the budget")
    elif json:
        as_json(asdict(state))
    else:
        raw(
            f"spent {number(state.spent_flops)} of {number(state.budget_flops)} FLOPs in {len(state.rounds)} rounds"
        )


def device(cluster: Cluster, path: Path, json: bool) -> None:
    """A measured device."""
    if json:
        as_json(cluster.model_dump())
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


def _plain(found: Cost) -> dict[str, Any]:
    return {**asdict(found), "step_seconds": found.step_seconds}


def _energy(joules: float | None) -> str:
    if joules is None:
        return "unknown: the cluster's file lacks static_watts, joules_per_flop or joules_per_byte"
    return f"{number(joules)} J, an estimate ({number(joules / 3.6e6)} kWh)"


def _unknown(value: float | None, unit: str, key: str) -> str:
    return f"unknown: the cluster's file lacks {key}" if value is None else f"{number(value)} {unit}"
