"""The split of a budget that minimises a law's loss, or of the least budget that reaches a loss; for many
parameter vectors at once.

Source: docs/theory D.2-D.6. With C = kappa N D chi(N, T), chi = 1 + scale g(T) N^-exponent, inference demand
2 N D_inference and repeats D'(D), an interior optimum satisfies

    alpha a N^-alpha = beta b D'^-beta g m,    zeta c T^-zeta = beta b D'^-beta g w + v,

where g = dlnD'/dlnD, m = 1 + dlnchi/dlnN + 2 N D_inference / C and w = dlnchi/dlnT. v is 0 but where memory bounds N
and a longer T makes that bound lower: then it is what that costs. In (log N, log T) the loss along the budget is convex
where attention costs in proportion to T: log chi and -log(budget - inference) are, and -log D' is convex and decreasing
in log D. So both conditions rise, and a bracketed root finds the only optimum, whichever limits bind. Where g
saturates, or memory bounds N by T, the least loss at each T of a grid brackets it. The same conditions hold for the
least compute that reaches a target loss; only D(N, T) differs. Letter: B replicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from escala.contract.errors import LawError
from escala.laws.law import Law
from escala.laws.optimum import Optimum
from escala.laws.powers import Floats
from escala.planning.curve import Curve
from escala.planning.limits import MEMORY, Budget, Chi, Limits, Speed

REPEAT_SCALE = 15.0  # R*: after 15 repeats the next is worth 1/e of a new token (Muennighoff et al. 2023)
LOG_N_BRACKET = (-100.0, 200.0)  # wider than any law in any unit; float64 holds every power inside
TOLERANCE = 1e-12  # of a condition, or (at a corner, which has no root) of log N and log T
STEPS = 60  # halvings of the bracket to TOLERANCE, and some
BINDS = 1e-9  # relative: closer to its bound than this, a limit binds
GRID = 4  # contexts per octave of those that bracket the best one; chi of a window changes within an octave
AT_ONCE = 8192  # pairs of a replicate and a context; more leave the processor's cache
STEEP = 1e3  # conditions are logs of a ratio; beyond e^1000 only the sign counts

Terms = dict[str, Floats]  # the law's parameters by name, (B,) each; 0 for what its form lacks


@dataclass(frozen=True)
class SplitProblem:
    """All but the law's parameters. What is not limited is inf."""

    limits: Limits
    kappa: float
    chi: Chi
    budgets: dict[str, float]  # FLOPs by the limit's name
    max_params: float
    unique_tokens: float
    inference_tokens: float
    experts: float  # bound on N_total/N_active; 1 for dense models
    context: tuple[float, float]  # bounds of T; equal where it is fixed
    longest: str  # how a plan names the upper one
    context_is_free: bool
    context_is_known: bool  # from the law or the caller; else T means nothing
    memory: Curve | None = None  # the most N_total by T
    target_nats: float | None = None

    @property
    def total_flops(self) -> float:
        """Bound on training plus inference."""
        return min((bound for name, bound in self.budgets.items() if name != "hours"), default=math.inf)

    def most_params(self, log_t_B: Floats) -> tuple[Floats, Floats]:
        """log of the most N_total at T, and minus its slope by log T."""
        bound, flat_B = math.log(self.max_params), np.zeros_like(log_t_B)
        if self.memory is None:
            return flat_B + bound, flat_B
        fits_B, slope_B = self.memory.at(log_t_B)
        return np.minimum(fits_B, bound), np.where(fits_B < bound, np.maximum(-slope_B, 0.0), 0.0)


class Conditions(NamedTuple):
    """At (N, T), (B,) each. `by_n`, `by_t`: log of what more of it costs (in the term of D) over what it gains (in its
    own term), which is 0 at an optimum; negative where more of it pays.
    """

    log_d: Floats
    by_n: Floats
    by_t: Floats
    aim: Floats  # what is least at the optimum: the sum of the law's terms; of a target loss, log FLOPs


class Splits(NamedTuple):
    """One per replicate; N, D and the FLOPs are inf where the target is never reached."""

    n_B: Floats
    t_B: Floats
    d_B: Floats
    chi_B: Floats
    flops_B: Floats  # training
    by_n_B: Floats  # the first-order conditions, as in `Conditions`
    by_t_B: Floats
    floor_B: Floats  # no compute goes below this loss: L_inf, and what max_params, data_tokens and T leave


def ask(
    law: Law,
    limits: Limits,
    kappa: float,
    chi: Chi,
    speed: Speed | None,
    context_tokens: float | None,
    memory: Curve | None = None,
) -> SplitProblem:
    """Raises LawError for a law that has no optimum, and for what is missing or makes no sense."""
    budgets = limits.budgets_flops(speed)
    dense_split(law, 1.0, kappa)
    if context_tokens is not None and not (math.isfinite(context_tokens) and context_tokens > 0):
        raise LawError(f"context_tokens = {context_tokens} must be a positive number.", "Say e.g. 2048.")
    in_law = "context_tokens" in law.form.columns
    if context_tokens is None and not in_law and chi.scale > 0:
        raise LawError("chi depends on the context T, and this law does not.", "Give context_tokens.")
    is_free = in_law and context_tokens is None
    context, longest = contexts(law, limits, memory) if is_free else ((context_tokens or 1.0,) * 2, "")
    return SplitProblem(
        limits=limits,
        kappa=kappa,
        chi=chi,
        budgets=budgets,
        max_params=limits.max_params or math.inf,
        unique_tokens=limits.data_tokens or math.inf,
        inference_tokens=limits.inference_tokens or 0.0,
        experts=limits.n_total_over_active if gains_from_experts(law) else 1.0,
        context=context,
        longest=longest,
        context_is_free=is_free,
        context_is_known=in_law or context_tokens is not None,
        memory=memory if is_free else None,
    )


def contexts(law: Law, limits: Limits, memory: Curve | None) -> tuple[tuple[float, float], str]:
    """The bounds of a T that is chosen, and what the upper one is called."""
    low, high = law.ranges["context_tokens"]
    longest = "longest_measured_context"
    if limits.max_context_tokens:
        low, high = min(low, limits.max_context_tokens), limits.max_context_tokens
        longest = limits.max_context_reason
    if memory is not None and math.exp(memory.log_x[-1]) < high * (1 - BINDS):
        high, longest = max(low, math.exp(memory.log_x[-1])), MEMORY
    return (low, high), longest


def gains_from_experts(law: Law) -> bool:
    """With rho = 0 experts lower no loss, so there is no reason to have them."""
    mix = law.form.mix
    return mix is not None and law.parameters[mix.parameter] > 0


def solve(law: Law, q: SplitProblem) -> tuple[Splits, Splits]:
    """The optimum of the law, and of each replicate that has one: those whose a or b is 0 are dropped."""
    estimate_BP = np.array([[law.parameters[name] for name in law.form.names]])
    interior_BP = law.replicates_BP[law.form.interior(law.replicates_BP)]
    return _solve(q, _terms(law, estimate_BP)), _solve(q, _terms(law, interior_BP))


def optimal_sizes(law: Law, budget: Budget) -> tuple[np.ndarray, Floats]:
    """Which replicates (B,) have an optimum, and the N of each of these. Raises as `ask`."""
    problem = ask(law, **vars(budget))
    return law.form.interior(law.replicates_BP), solve(law, problem)[1].n_B


def dense_split(law: Law, compute_flops: float, kappa: float) -> Optimum:
    """The closed form without experts or limits. Raises LawError for a law that has none, and for kappa."""
    held = {"context_tokens": 1.0, "n_total_over_active": 1.0}  # T does not move N and D
    return law.form.optimum(law.parameters, compute_flops, kappa=kappa, **held)


def effective_tokens(tokens: Floats, unique_tokens: float) -> Floats:
    """D' = U + U R* (1 - exp(-R/R*)), U = min(D, unique), R = D/U - 1 (docs/theory D.6)."""
    used = np.minimum(tokens, unique_tokens)
    return used * (1.0 - REPEAT_SCALE * np.expm1(-(tokens / used - 1.0) / REPEAT_SCALE))


def _terms(law: Law, theta_BP: Floats) -> Terms:
    """The form's parameters under the names of the conditions above."""
    form, zero_B = law.form, np.zeros(len(theta_BP))
    named = dict(zip(form.names, theta_BP.T, strict=True))
    out = {"L_inf": named["L_inf"], "c": zero_B, "zeta": zero_B, "rho": zero_B}
    out["gamma"] = zero_B + 1.0
    inputs = (form.size_term, form.token_term, form.term_of("context_tokens"))
    for (coefficient, exponent), term in zip(
        (("a", "alpha"), ("b", "beta"), ("c", "zeta")), inputs, strict=True
    ):
        if term is not None:
            out |= {coefficient: named[term.coefficient], exponent: named[term.exponent]}
    if form.mix is not None:
        out["rho"] = named[form.mix.parameter]
    if form.join is not None:  # the powers' sum is least where the loss is
        gamma = out["gamma"] = named[form.join.parameter]
        out |= {name: out[name] ** (1.0 / gamma) for name in ("a", "b")}
        out |= {name: out[name] / gamma for name in ("alpha", "beta")}
    return out


def _solve(q: SplitProblem, law: Terms) -> Splits:
    """The best T, each with its best N; what lies beyond a bound sits on it."""
    with np.errstate(all="ignore"):  # infinities stand for what is never reached
        log_t_B = _best_context(q, law)
        log_n_B = _best_size(q, law, log_t_B)
        at = _conditions(q, law, log_n_B, log_t_B)
        n_B, d_B, chi_B = np.exp(log_n_B), np.exp(at.log_d), 1.0 + q.chi.excess(log_n_B, log_t_B)
        floor_B = _floor(q, law)
        if q.target_nats is not None:
            reached_B = np.isfinite(d_B) & (q.target_nats > floor_B)
            n_B, d_B = np.where(reached_B, n_B, math.inf), np.where(reached_B, d_B, math.inf)
        flops_B = q.kappa * n_B * d_B * chi_B
        return Splits(n_B, np.exp(log_t_B), d_B, chi_B, flops_B, at.by_n, at.by_t, floor_B)


def _best_size(q: SplitProblem, law: Terms, log_t_B: Floats) -> Floats:
    """log of the best N at each T."""
    high_B = np.minimum(LOG_N_BRACKET[1], q.most_params(log_t_B)[0])
    if q.target_nats is None and q.inference_tokens:
        high_B = np.minimum(high_B, math.log(q.total_flops / q.inference_tokens / 2.0) - BINDS)
    low_B = np.full_like(log_t_B, LOG_N_BRACKET[0])
    return _rising_root(lambda log_n_B: _conditions(q, law, log_n_B, log_t_B).by_n, low_B, high_B)


def _best_context(q: SplitProblem, law: Terms) -> Floats:
    """log of the best T, where each T has its best N."""
    low_B, high_B = (np.full_like(law["a"], math.log(bound)) for bound in q.context)
    if not q.context_is_free:
        return low_B

    if q.chi.growth is not None or q.memory is not None:
        low_B, high_B = _bracket(q, law, low_B, high_B)
    return _rising_root(lambda log_t_B: _best(q, law, log_t_B).by_t, low_B, high_B)


def _best(q: SplitProblem, law: Terms, log_t_B: Floats) -> Conditions:
    """At the best N of each T."""
    return _conditions(q, law, _best_size(q, law, log_t_B), log_t_B)


def _bracket(q: SplitProblem, law: Terms, low_B: Floats, high_B: Floats) -> tuple[Floats, Floats]:
    """The neighbours of the best of a grid of contexts, in logs."""
    if not len(low_B):
        return low_B, high_B
    points = 2 + math.ceil(GRID * (high_B[0] - low_B[0]) / math.log(2.0))
    grid_K = np.linspace(low_B[0], high_B[0], points)
    rows, aims_KB = max(1, AT_ONCE // len(low_B)), np.empty((points, len(low_B)))
    for first in range(0, points, rows):
        part_K = grid_K[first : first + rows]
        tiled = {name: np.tile(values_B, len(part_K)) for name, values_B in law.items()}
        found_B = _best(q, tiled, np.repeat(part_K, len(low_B))).aim
        aims_KB[first : first + rows] = found_B.reshape(len(part_K), -1)
    best_B = np.nan_to_num(aims_KB, nan=math.inf, posinf=math.inf).argmin(axis=0)
    return grid_K[np.maximum(best_B - 1, 0)], grid_K[np.minimum(best_B + 1, points - 1)]


def _conditions(q: SplitProblem, law: Terms, log_n_B: Floats, log_t_B: Floats) -> Conditions:
    """D that the budget leaves, or that the target takes, and the first-order conditions of N and T."""
    excess_B, growth_B = q.chi.at(log_n_B, log_t_B)
    attention_B = excess_B / (1.0 + excess_B)  # dlnchi/dlnN is -exponent times this
    log_most_B, relief_B = q.most_params(log_t_B)
    log_n_eff_B, free_B = _effective_size(q, law, log_n_B, log_most_B)
    share_B = np.where(free_B, 1.0, 1.0 - law["rho"])  # dlnN_eff/dlnN
    by_n_B = law["a"] * np.exp(-law["alpha"] * log_n_eff_B)
    by_t_B = law["c"] * np.exp(-law["zeta"] * log_t_B)
    if q.target_nats is None:
        log_d_B, inference_B = _tokens_of_budget(q, log_n_B, np.log1p(excess_B))
    else:
        above_B = np.maximum(q.target_nats - law["L_inf"], 0.0) ** (1.0 / law["gamma"])
        log_d_B = _tokens_of_gap(q, law, above_B - by_n_B - by_t_B)
        inference_B = 2.0 * q.inference_tokens / (q.kappa * (1.0 + excess_B)) * np.exp(-log_d_B)
    tokens_B = np.exp(log_d_B)
    log_eff_B = np.log(effective_tokens(tokens_B, q.unique_tokens))
    repeats_B = np.maximum(tokens_B / q.unique_tokens - 1.0, 0.0)
    log_g_B = log_d_B - log_eff_B - repeats_B / REPEAT_SCALE
    log_by_d_B = np.log(law["beta"] * law["b"]) - law["beta"] * log_eff_B + log_g_B
    slope_B = 1.0 - q.chi.exponent * attention_B + inference_B
    n_B = log_by_d_B + np.log(slope_B) - np.log(share_B * law["alpha"] * by_n_B)
    cost_B = log_by_d_B + np.log(attention_B * growth_B)
    if q.memory is not None:
        capped_B = np.where(log_n_B >= log_most_B - BINDS, np.maximum(-np.expm1(n_B), 0.0), 0.0) * share_B
        lost_B = capped_B + np.where(free_B, 0.0, law["rho"])  # of N's gain, where its bound is lower
        cost_B = np.logaddexp(cost_B, np.log(relief_B * lost_B * law["alpha"] * by_n_B))
    t_B = cost_B - np.log(law["zeta"] * by_t_B)
    t_B = np.where(by_t_B == 0.0, STEEP, t_B)  # a longer context lowers nothing
    endless_B = np.isposinf(log_d_B)  # no D reaches the target from here: more N, more T
    n_B, t_B = np.where(endless_B, -STEEP, n_B), np.where(endless_B & (by_t_B > 0.0), -STEEP, t_B)
    n_B, t_B = (np.nan_to_num(np.clip(v_B, -STEEP, STEEP)) for v_B in (n_B, t_B))
    if q.target_nats is None:
        aim_B = by_n_B + law["b"] * np.exp(-law["beta"] * log_eff_B) + by_t_B
    else:
        aim_B = log_n_B + np.logaddexp(
            math.log(q.kappa) + log_d_B + np.log1p(excess_B), np.log(2.0 * q.inference_tokens)
        )
    return Conditions(log_d_B, n_B, t_B, aim_B)


def _effective_size(
    q: SplitProblem, law: Terms, log_n_B: Floats, log_most_B: Floats
) -> tuple[Floats, np.ndarray]:
    """log N_eff at the most N_total that the limits allow, and whether that grows with N."""
    log_ratio_B = np.minimum(math.log(q.experts), log_most_B - log_n_B)
    return log_n_B + law["rho"] * log_ratio_B, log_ratio_B >= math.log(q.experts)


def _tokens_of_budget(q: SplitProblem, log_n_B: Floats, log_chi_B: Floats) -> tuple[Floats, Floats]:
    """log D that the budgets leave, and inference's share in -dlnD/dlnN."""
    inference_B, training = 2.0 * q.inference_tokens * np.exp(log_n_B), q.budgets.get("hours", math.inf)
    spare_B = q.total_flops - inference_B
    log_d_B = np.log(np.minimum(spare_B, training)) - math.log(q.kappa) - log_n_B - log_chi_B
    return log_d_B, np.where(spare_B <= training, inference_B / spare_B, 0.0)


def _tokens_of_gap(q: SplitProblem, law: Terms, gap_B: Floats) -> Floats:
    """log of the D whose term is `gap_B`; inf where no D is enough. The inverse of `effective_tokens`."""
    log_eff_B = np.where(gap_B > 0, (np.log(law["b"]) - np.log(gap_B)) / law["beta"], math.inf)
    if math.isinf(q.unique_tokens):
        return log_eff_B
    over_B = np.exp(log_eff_B) / q.unique_tokens - 1.0
    repeats_B = np.where(over_B < REPEAT_SCALE, -REPEAT_SCALE * np.log1p(-over_B / REPEAT_SCALE), math.inf)
    return np.where(over_B <= 0, log_eff_B, math.log(q.unique_tokens) + np.log1p(repeats_B))


def _floor(q: SplitProblem, law: Terms) -> Floats:
    most = q.max_params if q.memory is None else min(q.max_params, math.exp(max(q.memory.log_y)))
    by_n_B = law["a"] * most ** -law["alpha"]
    by_d_B = law["b"] * (q.unique_tokens * (1.0 + REPEAT_SCALE)) ** -law["beta"]
    by_t_B = law["c"] * q.context[1] ** -law["zeta"]
    return law["L_inf"] + (by_t_B + by_n_B + by_d_B) ** law["gamma"]


def _rising_root(f: Callable[[Floats], Floats], low_B: Floats, high_B: Floats) -> Floats:
    """Where each rising f crosses 0 between its ends; the nearer end where it does not.

    Ridders' method (1979): quadratic where f is smooth, and it halves the bracket at a jump (a corner). There
    a small step is no sign of the end, so only f and the bracket are.
    """
    at_low_B, at_high_B = f(low_B), f(high_B)
    low_B = np.where(at_high_B <= 0, high_B, low_B)
    high_B = np.where(at_low_B >= 0, low_B, high_B)
    root_B = low_B
    for _ in range(STEPS):
        middle_B = (low_B + high_B) / 2.0
        at_middle_B = f(middle_B)
        step_B = (middle_B - low_B) * at_middle_B / np.sqrt(at_middle_B**2 - at_low_B * at_high_B)
        root_B = np.clip(np.where(np.isfinite(step_B), middle_B - step_B, middle_B), low_B, high_B)
        at_root_B = f(root_B)
        for point_B, value_B in ((middle_B, at_middle_B), (root_B, at_root_B)):
            rise_B, fall_B = (value_B < 0) & (point_B >= low_B), (value_B >= 0) & (point_B <= high_B)
            low_B, at_low_B = np.where(rise_B, point_B, low_B), np.where(rise_B, value_B, at_low_B)
            high_B, at_high_B = np.where(fall_B, point_B, high_B), np.where(fall_B, value_B, at_high_B)
        if ((np.abs(at_root_B) <= TOLERANCE) | (high_B - low_B <= TOLERANCE)).all():
            break
    return root_B
