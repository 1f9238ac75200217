"""Plans and proposals, as `escala.client` offers them: the law by name, the cluster by name, the run that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala import spec
from escala.contract.errors import LawError, SpecError
from escala.hardware import load_cluster
from escala.laws import queries as laws
from escala.laws.files import ATTENTION
from escala.laws.reference import Stored
from escala.planning import cost, shapes, split
from escala.planning.allocate import allocate, front, to_target
from escala.planning.law_runs import (
    base_of,
    context_of,
    document_tokens,
    has_context,
    measured_contexts,
)
from escala.planning.limits import DOCUMENTS, MEMORY, Budget, Chi, Limits, Speed
from escala.planning.plan import Plan, Target
from escala.schema.hardware import Cluster, Precision
from escala.settings import Settings

if TYPE_CHECKING:
    from escala.planning.propose import Proposal

CHI_SPAN = (1e5, 1e11)  # parameters of the shapes whose attention gives chi
FRONT_POINTS, FRONT_DECADES = 9, 2.0


@dataclass(frozen=True)
class Planned:
    """A plan with the law and the cluster that gave it. `assumed`: what the question left open.

    attention: the kind that the plan's model has, in words; None where attention was not counted.
    memory_bytes: of a device in training; None without a cluster whose memory bounds the plan.
    state_bytes: what generation keeps of a sequence of the plan's T.
    """

    law: Stored
    plan: Plan
    cluster: Cluster | None
    assumed: tuple[str, ...]
    attention: str | None
    memory_bytes: float | None
    state_bytes: float | None


@dataclass(frozen=True)
class Proposed:
    """Runs to make next, best first, and the law that asked for them. `plan`: what they are to make better known, as
    `plan_law` has it; None where that is a point.
    """

    law: Stored
    proposals: Sequence[Proposal]
    method: str
    plan: Plan | None


@dataclass(frozen=True)
class PlanOptions:
    """What plans, proposals and explorations are asked beside their limits.

    cluster: a name or file, whose devices' memory then bounds N; None: ESCALA_CLUSTER, where a limit needs one.
    max_memory_gb: of one device, instead of all that it has.
    attention: the kind that the planned model has, e.g. `hybrid,window_tokens=512`; None: that of the law's runs.
    """

    kappa: float = 6.0
    context_tokens: float | None = None
    cluster: str | None = None
    precision: Precision = "bf16"
    max_memory_gb: float | None = None
    refresh: bool = False
    attention: str | None = None


@dataclass(frozen=True)
class Asked:
    """A question with its law, its cluster and the budget in full (memory among its limits); `assumed`: in words.
    `model`: what the shapes of its N share, with their kind of attention.
    """

    law: Stored
    cluster: Cluster | None
    budget: Budget
    assumed: tuple[str, ...]
    model: Mapping[str, Any]
    options: PlanOptions

    def answer(self) -> Planned:
        """The best split of the budget. Raises LawError."""
        return self.planned(allocate(self.law.law, **vars(self.budget)))

    def planned(self, plan: Plan) -> Planned:
        """A plan with what it rests on."""
        context, precision, cluster = plan.context_tokens, self.options.precision, self.cluster
        memory = state = None
        if context is not None:
            state = shapes.state_of(self.model, precision, plan.n_total, context)
            if cluster is not None and _bounds_memory(self.options):
                memory = shapes.memory_of(self.model, cluster, precision, plan.n_total, context)
        words = None if context is None else shapes.described(self.model)
        return Planned(self.law, plan, cluster, self.assumed, words, memory, state)


def plan_law(
    settings: Settings, reference: str, limits: Limits, options: PlanOptions = PlanOptions()
) -> Planned:
    """The best split of N and D (and T, and experts) under `limits`. Raises LawError, NotFoundError, SpecError."""
    return ask(settings, laws.law(settings, reference, options.refresh), limits, options).answer()


def plan_front(
    settings: Settings, reference: str, limits: Limits, options: PlanOptions = PlanOptions()
) -> list[Planned]:
    """Plans for budgets from a hundredth to the whole of the one given. Raises as `plan_law`."""
    asked = ask(settings, laws.law(settings, reference, options.refresh), limits, options)
    top = asked.answer().plan
    most = top.compute_flops + top.inference_flops
    budgets = [most * 10 ** (-FRONT_DECADES * i / (FRONT_POINTS - 1)) for i in range(FRONT_POINTS)]
    found = front(asked.law.law, budgets=budgets, **vars(asked.budget))
    return [asked.planned(plan) for plan in found]


def plan_kinds(
    settings: Settings,
    reference: str,
    limits: Limits,
    kinds: Sequence[str],
    options: PlanOptions = PlanOptions(),
) -> list[Planned]:
    """The plan of each kind of attention under the same limits. The loss is the law's: that of another kind than its
    own is taken as equal, which `assumed` says.

    Args:
        kinds: names, each with its options behind it: `hybrid`, `hybrid,window_tokens=512,features.count=128`.

    Raises as `plan_law`, and LawError where neither law nor question has a context, so that attention costs nothing.
    """
    stored = laws.law(settings, reference, options.refresh)
    if options.context_tokens is None and context_of(stored) is None and not has_context(stored):
        raise LawError(
            f"{stored.reference} knows no context T, so kinds of attention cost the same.",
            "Say the context: --context-tokens 2048.",
        )
    return [ask(settings, stored, limits, replace(options, attention=kind)).answer() for kind in kinds]


def plan_target(
    settings: Settings, reference: str, loss_nats: float, options: PlanOptions = PlanOptions()
) -> tuple[Planned, Target]:
    """The least compute that reaches a loss, its split, and its energy (docs/theory E.5). Raises as `plan_law`."""
    asked = ask(settings, laws.law(settings, reference, options.refresh), Limits(), options)
    target = to_target(asked.law.law, loss_nats, **vars(asked.budget))
    return asked.planned(target.plan), target


def ask(settings: Settings, stored: Stored, limits: Limits, options: PlanOptions = PlanOptions()) -> Asked:
    """The question in full: plans, proposals and explorations of one law and one budget start from the same.

    Raises LawError, NotFoundError, SpecError.
    """
    context, in_law = options.context_tokens or context_of(stored), has_context(stored)
    model = base_of(stored).get("model", {})
    own = shapes.described(model)
    if options.attention is not None:
        model = shapes.with_attention(model, options.attention)
    chi = Chi() if context is None and not in_law else _chi(stored, model, context)
    assumed = [_cost_in_words(options.kappa, chi, shapes.described(model))]
    if chi.scale and not base_of(stored):
        said = stored.provenance.get(ATTENTION)
        of_table = (
            "does not say which attention its runs had"
            if said is None
            else f"is of runs with attention {said}"
        )
        assumed.append(
            f"the law {of_table}, and has no configuration: costs are of {own}, unless --attention says more"
        )
    if (other := shapes.described(model)) != own:
        assumed.append(
            f"the loss was measured with attention {own}: that {other} has the same is an assumption"
            + shapes.reach(model)
        )
    wanted = options.cluster is not None or limits.usd or limits.hours or limits.kwh or options.max_memory_gb
    cluster = load_cluster(options.cluster or settings.cluster) if wanted else None
    speed = None
    if cluster is not None:
        speed, how = cluster_speed(cluster, options.precision)
        assumed.append(how)
    free, documents = in_law and options.context_tokens is None, document_tokens(stored)
    if free and documents is not None and (limits.max_context_tokens or 0.0) > documents:
        limits = replace(limits, max_context_tokens=documents, max_context_reason=DOCUMENTS)
    budget = Budget(limits, options.kappa, chi, speed, None if free else context)
    if cluster is not None and _bounds_memory(options):
        budget, how = _within_memory(stored, cluster, budget, model, options)
        assumed.append(how)
    return Asked(stored, cluster, budget, tuple(assumed), model, options)


def chi_of(stored: Stored, context: float | None = None) -> Chi:
    """chi(N, T) of the recipe's shapes with the attention of the law's runs (docs/theory D.2).

    Its share over N is exact at `context` (None: the longest that the law knows, or 1).
    """
    return _chi(stored, base_of(stored).get("model", {}), context)


def _chi(stored: Stored, model: Mapping[str, Any], context: float | None) -> Chi:
    longest = stored.law.ranges.get("context_tokens", (1.0, 1.0))[1]
    return shapes.chi_of(model, stored.law.ranges.get(stored.law.size, CHI_SPAN), context or longest)


def _cost_in_words(kappa: float, chi: Chi, attention: str) -> str:
    if not chi.scale:
        return f"C = {kappa:g} N D"
    factor = f"{chi.scale:.3g} {'T' if chi.growth is None else 'g(T)'} N^-{chi.exponent:.3g}"
    words = f"C = {kappa:g} N D (1 + {factor}), attention {attention}"
    return words + (", whose cost saturates in T: limits alone bound T" if chi.saturates else "")


def _bounds_memory(options: PlanOptions) -> bool:
    """Whether a device's memory is among the limits."""
    return bool(options.max_memory_gb or options.cluster)


def _within_memory(
    stored: Stored, cluster: Cluster, budget: Budget, model: Mapping[str, Any], options: PlanOptions
) -> tuple[Budget, str]:
    """The budget with a device's memory among its limits: of N, and of T where that is chosen; in words. Raises
    LawError where no model trains.
    """
    limit = options.max_memory_gb * 1e9 if options.max_memory_gb else cluster.device.memory_bytes.value
    free = has_context(stored) and budget.context_tokens is None
    tokens = int(budget.context_tokens or 2048)
    length = "T" if free else tokens
    words = f"memory: ZeRO-3 on {cluster.devices} devices, a sequence of {length} tokens, checkpointing"
    if free:
        contexts, _ = split.contexts(stored.law, budget.limits, None)
        curve = shapes.memory_curve(model, cluster, options.precision, limit, contexts)
        return replace(budget, memory=curve), words
    (most,) = shapes.largest_models(model, cluster, options.precision, limit, [tokens])
    if most is None:
        raise shapes.no_model(limit, tokens)
    limits = budget.limits
    if limits.max_params is None or most < limits.max_params:
        limits = replace(limits, max_params=most, max_params_reason=MEMORY)
    return replace(budget, limits=limits), words


def cluster_speed(cluster: Cluster, precision: Precision) -> tuple[Speed, str]:
    """All devices at the speed that a training step reaches, what an hour of them costs, what they draw; in words."""
    device = cluster.device
    if precision not in device.peak_flops_per_second:
        raise SpecError(
            f"the cluster's device has no figures for {precision}",
            f"--precision {next(iter(device.peak_flops_per_second))}",
        )
    measured = (device.training or {}).get(precision)
    peak = device.peak_flops_per_second[precision].value
    reached = measured.block[max(measured.block)] if measured else peak * cost.utilization(device)
    rates, flops = cluster.rates(), cluster.devices * reached
    joules = rates.joules(
        cluster.devices, 1.0, flops, cluster.devices * device.memory_bytes_per_second.value / 2
    )
    words = (
        f"{cluster.devices} devices at {reached / 1e12:.3g} TFLOP/s each in {precision} ({device.measured})"
    )
    if joules is not None:
        words += "; energy is an estimate, at half of the memory's bandwidth"
    return Speed(flops, rates.usd(cluster.devices, 3600.0), joules), words


def config_for(
    stored: Stored,
    n_active: float,
    n_total: float,
    tokens: float,
    overrides: Sequence[str] = (),
    context_tokens: float | None = None,
) -> dict[str, Any]:
    """The configuration of a run of N and D (and T, where the law has it: `context_tokens`), like the law's runs; of
    mixtures of experts the number of experts follows from both N. Raises SpecError for a law that knows none.
    """
    from escala.sweeps.recipes import by_recipe, experts

    base = base_of(stored)
    if not base:
        raise SpecError(
            f"{stored.reference} was fitted to a table: it does not know how its runs were configured",
            "escala submit pretrain SPEC.yaml --compute-flops C --law NAME",
        )
    axes = {"n_total": n_total, "tokens": tokens}
    if context_tokens is not None and has_context(stored):
        axes["context_tokens"] = context = float(round(context_tokens))
        base = _without_context(base, context)
    written = spec.written((), overrides, base)
    model = written.get("model", {})
    if model.get("moe"):
        axes["n_active"] = n_active
        del axes["n_total"]
        written = spec.merge({"model": {"moe": {"experts": experts(n_active, n_total, model)}}}, written)
    return spec.merge(by_recipe(written, axes), written)


def _without_context(base: dict[str, Any], context: float) -> dict[str, Any]:
    """`base` where the context is an axis: it says none, and no model that reads less."""
    training = {key: value for key, value in base.get("training", {}).items() if key != "context_tokens"}
    model = dict(base.get("model", {}))
    if model.get("max_context_tokens", context) < context:
        del model["max_context_tokens"]
    return {**base, "model": model, "training": training}


def propose_runs(
    settings: Settings,
    reference: str,
    target: Limits | Mapping[str, float],
    max_flops: float,
    options: PlanOptions = PlanOptions(),
    *,
    aim: str = "loss",
    count: int = 1,
    unit: str = "FLOP",
    width: float | None = None,
) -> Proposed:
    """The next runs: those that most shrink the interval of the mean loss (or of N*) at the target per `unit` of cost.

    Args:
        target: limits, whose optimum (that of `plan_law`) is the point; or the point itself.
        max_flops: of one run.
        unit: FLOP, USD or kWh; the last two by the cluster's figures.

    Raises LawError, NotFoundError, SpecError.
    """
    from escala.planning.propose import METHOD, candidates, propose

    stored = laws.law(settings, reference, options.refresh)
    aimed: Budget | Mapping[str, float]
    if isinstance(target, Limits):
        asked = ask(settings, stored, target, options)
        aimed, plan = asked.budget, asked.answer().plan
    else:
        aimed, plan = target, None
    columns = candidates(stored.law, max_flops, context_tokens=measured_contexts(stored))
    if base := base_of(stored):
        columns = _buildable(columns, base.get("model", {}))
    rate = _rate(unit, options.cluster or settings.cluster, options.precision)
    price = partial(_price, rate=rate, chi=chi_of(stored) if has_context(stored) else Chi())
    found = propose(stored.law, aimed, columns, aim=aim, count=count, width=width, cost=price, unit=unit)
    return Proposed(stored, found, METHOD, plan)


def propose_rows(
    settings: Settings,
    reference: str,
    pool: Path,
    cost: str,
    targets: Path | None,
    target: Limits | None,
    options: PlanOptions,
    count: int,
) -> tuple[Stored, list[tuple[int, float, float]]]:
    """The law, and (row, cost, expected error) of the next rows of a pool: for the rows of `targets`, or the plan of
    `target`.

    Raises LawError, NotFoundError, SpecError.
    """
    import numpy as np

    from escala.planning import pool_table

    stored = laws.law(settings, reference, options.refresh)
    if targets is not None:
        return stored, pool_table.propose_rows(stored.law, pool, targets, cost, count=count)
    if target is None:
        raise LawError("A proposal needs a target.", "Give --targets TARGETS.csv, or --target-flops.")
    point = ask(settings, stored, target, options).answer().plan.point(stored.law.size)
    aims = {name: np.array([value]) for name, value in point.items()}
    return stored, pool_table.propose_rows(stored.law, pool, aims, cost, count=count)


def _buildable(columns: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The candidates whose N the recipe has a shape for. Raises LawError where none is left."""
    import numpy as np

    from escala.sweeps import recipes

    def has_shape(n: float) -> bool:
        try:
            recipes.shape(n, model, "n_total")
        except SpecError:
            return False
        return True

    kept = np.array([has_shape(float(n)) for n in columns["n_total"]])
    if not kept.any():
        raise LawError("The recipe has no model of any N among the candidates.", "Raise --max-flops.")
    return {name: column[kept] for name, column in columns.items()}


def _price(columns: Mapping[str, Any], rate: float, chi: Chi) -> Any:
    """`rate` per FLOP of 6 N D; of runs that differ in T, attention's part too."""
    flops = columns["compute_flops"]
    if chi.scale:
        import numpy as np

        flops = flops * (1.0 + chi.excess(np.log(columns["n_active"]), np.log(columns["context_tokens"])))
    return flops * rate


def _rate(unit: str, cluster: str, precision: Precision) -> float:
    """`unit` per FLOP. Raises SpecError where the cluster's file does not say."""
    if unit == "FLOP":
        return 1.0
    if unit not in ("USD", "kWh"):
        raise SpecError(f"there is no unit {unit!r}", "FLOP, USD or kWh")
    speed, _ = cluster_speed(load_cluster(cluster), precision)
    kilowatts = None if speed.watts is None else speed.watts / 1000
    rate = speed.usd_per_hour if unit == "USD" else kilowatts
    if rate is None:
        raise SpecError(
            f"the cluster's file says nothing of {unit}",
            "set usd_per_device_hour, or the energy coefficients",
        )
    return rate / 3600 / speed.flops_per_second
