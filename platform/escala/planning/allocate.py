"""Plans: N, D, T and N_total/N_active that minimise a law's loss under several limits; the Pareto front; and
the least compute to a loss. How the split is found: split.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from escala.contract.errors import LawError
from escala.laws.intervals import FEWEST_REPLICATES, quantile_pair
from escala.laws.law import Law
from escala.laws.powers import Floats
from escala.planning import split
from escala.planning.advice import advise
from escala.planning.curve import Curve
from escala.planning.limits import MEMORY, Chi, Limits, Speed
from escala.planning.plan import Plan, Target
from escala.planning.split import BINDS, SplitProblem, Splits


def allocate(
    law: Law,
    limits: Limits,
    *,
    kappa: float = 6.0,
    chi: Chi = Chi(),
    speed: Speed | None = None,
    context_tokens: float | None = None,
    memory: Curve | None = None,
) -> Plan:
    """The split that minimises the law's loss under `limits`. T is chosen too where the law has it, unless
    `context_tokens` fixes it.

    Raises LawError for form c or moe_cf, a law without an interior optimum, no budget at all, and a budget
    in dollars, hours or kWh that `speed` cannot turn into FLOPs.
    """
    if not limits.has_budget:
        raise LawError("There is no budget to split.", "Give compute_flops, usd, hours or kwh.")
    question = split.ask(law, limits, kappa, chi, speed, context_tokens, memory)
    return _plan(law, question, *split.solve(law, question), speed)


def front(
    law: Law,
    limits: Limits,
    budgets: Sequence[float],
    *,
    kappa: float = 6.0,
    chi: Chi = Chi(),
    speed: Speed | None = None,
    context_tokens: float | None = None,
    memory: Curve | None = None,
) -> list[Plan]:
    """Plans at each compute budget, from the least: the Pareto front of loss against FLOPs (with a speed,
    against dollars and kWh). Other limits are held; one that binds ends the front: its plans repeat.
    """
    answer = partial(
        allocate, law, kappa=kappa, chi=chi, speed=speed, context_tokens=context_tokens, memory=memory
    )
    return [answer(replace(limits, compute_flops=flops)) for flops in sorted(budgets)]


def to_target(
    law: Law,
    loss_nats: float,
    limits: Limits = Limits(),
    *,
    kappa: float = 6.0,
    chi: Chi = Chi(),
    speed: Speed | None = None,
    context_tokens: float | None = None,
    memory: Curve | None = None,
) -> Target:
    """The least compute (training and inference demand) at which the law's mean is `loss_nats`.

    Raises LawError for a loss at or below the law's floor under `limits`, and for limits with a budget.
    """
    if limits.has_budget:
        raise LawError(
            "The least compute to a loss is an answer, so it takes no budget.",
            "Leave out compute_flops, usd, hours and kwh, and compare them with the answer.",
        )
    question = replace(
        split.ask(law, limits, kappa, chi, speed, context_tokens, memory), target_nats=loss_nats
    )
    best, replicates = split.solve(law, question)
    if not math.isfinite(best.flops_B[0]):
        raise LawError(
            f"A loss of {loss_nats:g} nats is not reached: under these limits the law's floor is "
            f"{best.floor_B[0]:.6g} (L_inf is {law.parameters['L_inf']:.6g}).",
            "Ask for a higher loss, or relax max_params, data_tokens or max_context_tokens.",
        )
    reached = float(np.isfinite(replicates.flops_B).mean()) if len(replicates.flops_B) else None
    plan = _plan(law, question, best, replicates, speed)
    return Target(plan, *_interval(replicates.flops_B), reached)


def _plan(law: Law, q: SplitProblem, best: Splits, replicates: Splits, speed: Speed | None) -> Plan:
    n, d, t = float(best.n_B[0]), float(best.d_B[0]), float(best.t_B[0])
    t = next((bound for bound in q.context if math.isclose(bound, t, rel_tol=BINDS)), t)
    most = _most_params(q, t)
    n = min(n, most)
    training, inference = float(best.flops_B[0]), 2.0 * n * q.inference_tokens
    n_total, effective = (
        min(q.experts * n, most),
        float(split.effective_tokens(best.d_B, q.unique_tokens)[0]),
    )
    point = {"n_active": n, "n_total": n_total, "compute_flops": training, law.size: n}
    if q.context_is_known:
        point["context_tokens"] = t
    prediction = law.predict(0.9, **point, tokens=effective)
    (n_low, n_high), (d_low, d_high) = _interval(replicates.n_B), _interval(replicates.d_B)
    t_low, t_high = _interval(replicates.t_B) if q.context_is_free else (None, None)
    spent = speed.spending(training + inference) if speed else {}
    plan = Plan(
        n_active=n,
        n_total=n_total,
        tokens=d,
        context_tokens=point.get("context_tokens"),
        loss_nats=prediction.loss_nats,
        low_nats=prediction.low_nats,
        high_nats=prediction.high_nats,
        n_active_low=n_low,
        n_active_high=n_high,
        tokens_low=d_low,
        tokens_high=d_high,
        context_tokens_low=t_low,
        context_tokens_high=t_high,
        compute_flops=training,
        inference_flops=inference,
        effective_tokens=effective,
        epochs=max(d / q.unique_tokens, 1.0),
        chi=float(best.chi_B[0]),
        hours=speed.spending(training)["hours"] if speed else None,
        usd=spent.get("usd"),
        kwh=spent.get("kwh"),
        binding=(),
        residuals={},
        extrapolation=law.predict(0.9, **point, tokens=d).extrapolation,
        advice=(),
    )
    plan = replace(plan, binding=tuple(dict.fromkeys(_binding(law, q, plan, t))))
    plan = replace(plan, residuals=_residuals(q, best, plan, t))
    return replace(plan, advice=tuple(advise(law, q, plan)))


def _most_params(q: SplitProblem, t: float) -> float:
    """The bound on N_total at T; inf where there is none."""
    return q.max_params if q.memory is None else float(np.exp(q.most_params(np.log([t]))[0][0]))


def _interval(values_B: Floats) -> tuple[float | None, float | None]:
    """The 90 % interval; an end that is never reached is None, and both are where hardly a replicate has an optimum."""
    if len(values_B) < FEWEST_REPLICATES:
        return None, None
    with np.errstate(invalid="ignore"):  # between two that are never reached lies nothing
        low, high = quantile_pair(values_B, 0.9)
    return low if math.isfinite(low) else None, high if math.isfinite(high) else None


def _binding(law: Law, q: SplitProblem, plan: Plan, t: float) -> Iterator[str]:
    """Names of the limits that hold the plan where it is."""
    for name, bound in q.budgets.items():
        used = plan.compute_flops + (0.0 if name == "hours" else plan.inference_flops)
        if used >= bound * (1 - BINDS):
            yield name
    most = _most_params(q, t)
    if plan.n_total >= most * (1 - BINDS):
        yield MEMORY if most < q.max_params else q.limits.max_params_reason
    if split.gains_from_experts(law) and plan.n_total >= q.experts * plan.n_active * (1 - BINDS):
        yield "n_total_over_active"
    if plan.tokens > q.unique_tokens * (1 + BINDS):
        yield "data_tokens"
    if q.context_is_free and t == q.context[1]:
        yield q.longest
    elif q.context_is_free and t == q.context[0]:
        yield "shortest_measured_context"


def _residuals(q: SplitProblem, best: Splits, plan: Plan, t: float) -> dict[str, float]:
    """As in the closed form, gain over cost less 1. A bound or a corner of two limits has none."""
    most = _most_params(q, t) * (1 - BINDS)
    corner = plan.n_active >= most or (plan.n_total >= most and "n_total_over_active" in plan.binding)
    shared = "hours" in plan.binding and len(set(plan.binding) & set(q.budgets)) > 1
    out = {}
    if not corner and not (shared and q.inference_tokens):
        out["N"] = math.expm1(-best.by_n_B[0])
    if q.context_is_free and t not in q.context:
        out["T"] = math.expm1(-best.by_t_B[0])
    return out
