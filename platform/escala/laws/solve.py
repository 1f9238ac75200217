"""Minimise the sum of Huber losses of many fits at once: damped Newton with bounds, batched over replicates.

Letters: B replicates (bootstrap weights, or starts), N points, P parameters, K terms; see powers.py.
The objective is sum_i w_i rho_delta(r_i), a SUM (a mean stops quasi-Newton early), with r = log L_obs - log
L_pred ("log") or L_obs - L_pred ("linear"). The step solves (H + mu A) s = -g with the exact Hessian H and A
the Hessian of the IRLS majoriser: mu -> 0 is Newton, large mu a short IRLS step, which always descends (Huber
& Ronchetti 2009, 7.8).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from escala.contract.errors import LawError
from escala.laws.form import Form
from escala.laws.powers import SMALLEST, Features, Floats, Joined, join, term_powers


@dataclass(frozen=True)
class Objective:
    """What is minimised: the SUM of Huber losses of residuals in `space` ("log" or "linear"), linear beyond
    `huber_delta`.
    """

    space: str = "log"
    huber_delta: float = 1e-3

    def __post_init__(self) -> None:
        if self.space not in ("log", "linear"):
            raise LawError(f"There is no residual space '{self.space}'.", "Choose log or linear.")
        if not 0 < self.huber_delta < float("inf"):
            raise LawError(f"huber_delta {self.huber_delta} must be positive.", "The default is 1e-3.")


def huber(residual: Floats, delta: float) -> Floats:
    """Huber's rho: r^2/2 within +-delta, delta (|r| - delta/2) beyond."""
    psi = np.clip(residual, -delta, delta)
    return psi * (residual - 0.5 * psi)


@dataclass(frozen=True)
class Problem:
    """One table to fit. `log_coefficient_P` marks coefficients optimised as their log (those with a
    prior).
    """

    form: Form
    features: Features
    loss_N: Floats
    objective: Objective
    low_P: Floats
    high_P: Floats  # low == high: a fixed parameter
    log_coefficient_P: np.ndarray
    prior_mean_P: Floats  # of the optimised parameter (log where marked)
    prior_weight_P: Floats  # Huber units per squared deviation; 0 without a prior
    prior_sd_P: Floats | float = 0.0  # as stated


@dataclass
class _Local:
    """Objective (B,), gradient (B, P), Hessian and majoriser (B, P, P) at a set of parameters."""

    value_B: Floats
    gradient_BP: Floats
    hessian_BPP: Floats
    majoriser_BPP: Floats

    def put(self, index: np.ndarray, other: _Local, chosen: np.ndarray) -> None:
        """Replace rows `index` by the rows `chosen` of `other`."""
        self.value_B[index] = other.value_B[chosen]
        self.gradient_BP[index] = other.gradient_BP[chosen]
        self.hessian_BPP[index] = other.hessian_BPP[chosen]
        self.majoriser_BPP[index] = other.majoriser_BPP[chosen]


def residuals(problem: Problem, loss_BN: Floats) -> Floats:
    """Residuals (B, N) in the objective's space."""
    if problem.objective.space == "log":
        return np.log(problem.loss_N) - np.log(loss_BN)
    return problem.loss_N - loss_BN


def local_model(problem: Problem, theta_BP: Floats, weight_BN: Floats, delta: float) -> _Local:
    """Objective, gradient and curvature at `theta_BP` for each row's weights."""
    form, k, log_space = problem.form, len(problem.form.terms), problem.objective.space == "log"
    size_B, size_P = theta_BP.shape
    powers, logs = term_powers(form, theta_BP, problem.features)
    joined = None if form.join is None else join(theta_BP, powers)
    if joined is None:
        loss_BN = theta_BP[:, :1] + sum(theta_BP[:, 1 + i, None] * power for i, power in enumerate(powers))
    else:
        loss_BN = theta_BP[:, :1] + joined.mean_BN
        powers = [power * slope for power, slope in zip(powers, joined.slope_KBN, strict=True)]
    np.maximum(
        loss_BN, 1e-6 * problem.loss_N.min(), out=loss_BN
    )  # all coefficients 0: a step that is refused
    residual_BN = residuals(problem, loss_BN)
    psi_BN = np.clip(residual_BN, -delta, delta)
    weighted_BN = weight_BN * psi_BN
    value_B = np.einsum("bn,bn->b", weighted_BN, residual_BN - 0.5 * psi_BN)

    slopes_BPN = np.empty((size_B, size_P, loss_BN.shape[1]))  # exponent rows still without their coefficient
    inverse_BN = 1.0 / loss_BN if log_space else np.ones_like(loss_BN)
    slopes_BPN[:, 0] = inverse_BN
    for i, term in enumerate(form.terms):
        np.multiply(powers[i], inverse_BN, out=slopes_BPN[:, 1 + i])
        np.multiply(slopes_BPN[:, 1 + i], -logs[i], out=slopes_BPN[:, 1 + k + i])
        if term.mix and problem.features.mix_N is not None:
            slopes_BPN[:, -1] = slopes_BPN[:, 1 + i] * theta_BP[:, 1 + k + i, None] * -problem.features.mix_N
    if joined is not None:
        slopes_BPN[:, -1] = joined.mean_BN * joined.entropy_BN * inverse_BN
    bare_BP = np.einsum("bn,bpn->bp", weighted_BN, slopes_BPN)
    second_BPP = _second_order(problem, theta_BP, weighted_BN, slopes_BPN, logs, bare_BP)
    if joined is not None:
        second_BPP += _join_curvature(theta_BP, weighted_BN * inverse_BN, joined, logs)
    scale_BP = np.ones_like(theta_BP)
    scale_BP[:, 1 + k : 1 + 2 * k] = theta_BP[:, 1 : 1 + k]
    if form.mixed:
        scale_BP[:, -1] = theta_BP[:, 1]

    size_BN = np.abs(residual_BN)
    newton_BN = weight_BN * (size_BN <= delta)
    majorise_BN = weight_BN * (delta / np.maximum(size_BN, delta))
    if log_space:
        newton_BN += weighted_BN
    outer_BPP = scale_BP[:, :, None] * scale_BP[:, None, :]
    transposed = slopes_BPN.transpose(0, 2, 1)
    hessian_BPP = (slopes_BPN * newton_BN[:, None, :]) @ transposed * outer_BPP - second_BPP
    majoriser_BPP = (slopes_BPN * majorise_BN[:, None, :]) @ transposed * outer_BPP
    local = _Local(value_B, -bare_BP * scale_BP, hessian_BPP, majoriser_BPP)
    return _with_priors(problem, theta_BP, local)


def _second_order(
    problem: Problem,
    theta_BP: Floats,
    weighted_BN: Floats,
    slopes_BPN: Floats,
    logs: list[Floats],
    bare_BP: Floats,
) -> Floats:
    """sum_i w psi d2L (over L in log space): the part of the Hessian from the law's own curvature. (B, P,
    P).
    """
    k = len(problem.form.terms)
    out_BPP = np.zeros((*theta_BP.shape, theta_BP.shape[1]))
    for i, term in enumerate(problem.form.terms):
        c, e = 1 + i, 1 + k + i
        coefficient_B = theta_BP[:, c]
        out_BPP[:, c, e] = out_BPP[:, e, c] = bare_BP[:, e]
        pulled_BN = weighted_BN * slopes_BPN[:, e]
        log_BN = np.broadcast_to(logs[i], pulled_BN.shape)
        out_BPP[:, e, e] = -coefficient_B * np.einsum("bn,bn->b", pulled_BN, log_BN)
        mix_N, alpha_B = problem.features.mix_N, theta_BP[:, e]
        if term.mix and mix_N is not None:
            mixed_BN = weighted_BN * slopes_BPN[:, -1]
            out_BPP[:, c, -1] = out_BPP[:, -1, c] = bare_BP[:, -1]
            cross_B = np.einsum("bn,bn->b", mixed_BN, log_BN) - bare_BP[:, -1] / alpha_B
            out_BPP[:, e, -1] = out_BPP[:, -1, e] = -coefficient_B * cross_B
            out_BPP[:, -1, -1] = -coefficient_B * alpha_B * (mixed_BN @ mix_N)
    return out_BPP


def _join_curvature(theta_BP: Floats, pulled_BN: Floats, joined: Joined, logs: list[Floats]) -> Floats:
    """What a power mean M adds to `_second_order`, (B, P, P). With shares s, entropy H and t the terms:

    d2M/dlog t_i dlog t_j = M (s_i [i = j] + (1/gamma - 1)(s_i [i = j] - s_i s_j)), of which the first part is a sum's;
    d2M/dlog t_i dgamma = M s_i (H - (log s_i + H)/gamma), d2M/dgamma2 = M (H^2 + sum s (log s + H)^2 / gamma).
    """
    k, gamma_B1 = len(logs), theta_BP[:, -1:]
    pulled_BN = pulled_BN * joined.mean_BN
    share_KBN, entropy_BN = joined.share_KBN, joined.entropy_BN
    above_KBN = joined.log_share_KBN + entropy_BN
    per_coefficient_BK = 1.0 / np.maximum(theta_BP[:, 1 : 1 + k], SMALLEST)
    ones_BN = np.ones_like(pulled_BN)
    rows = [(1 + i, i, ones_BN, per_coefficient_BK[:, i]) for i in range(k)]
    rows += [(1 + k + i, i, -np.broadcast_to(logs[i], pulled_BN.shape), ones_BN[:, 0]) for i in range(k)]
    out_BPP = np.zeros((*theta_BP.shape, theta_BP.shape[1]))
    out_BPP[:, -1, -1] = np.einsum(
        "bn,bn->b", pulled_BN, entropy_BN**2 + (share_KBN * above_KBN**2).sum(axis=0) / gamma_B1
    )
    for p, i, slope_BN, unit_B in rows:
        left_BN = pulled_BN * share_KBN[i] * slope_BN
        by_gamma_B = np.einsum("bn,bn->b", left_BN, entropy_BN - above_KBN[i] / gamma_B1) * unit_B
        out_BPP[:, p, -1] = out_BPP[:, -1, p] = by_gamma_B
        for r, j, other_BN, other_unit_B in rows:
            spread_BN = ((i == j) - share_KBN[j]) * (1.0 / gamma_B1 - 1.0)
            out_BPP[:, p, r] = np.einsum("bn,bn->b", left_BN, spread_BN * other_BN) * unit_B * other_unit_B
    return out_BPP


def _with_priors(problem: Problem, theta_BP: Floats, local: _Local) -> _Local:
    """Change marked coefficients to their logs and add the priors."""
    marked = problem.log_coefficient_P
    diagonal = np.arange(theta_BP.shape[1])
    if marked.any():
        chain_BP = np.where(marked, theta_BP, 1.0)
        local.hessian_BPP *= chain_BP[:, :, None] * chain_BP[:, None, :]
        local.majoriser_BPP *= chain_BP[:, :, None] * chain_BP[:, None, :]
        local.gradient_BP *= chain_BP
        local.hessian_BPP[:, diagonal, diagonal] += np.where(marked, local.gradient_BP, 0.0)
    weight_P = problem.prior_weight_P
    if weight_P.any():
        away_BP = np.where(marked, np.log(np.where(marked, theta_BP, 1.0)), theta_BP) - problem.prior_mean_P
        away_BP = np.where(weight_P > 0, away_BP, 0.0)
        local.value_B += 0.5 * (weight_P * away_BP**2).sum(axis=1)
        local.gradient_BP += weight_P * away_BP
        local.hessian_BPP[:, diagonal, diagonal] += weight_P
        local.majoriser_BPP[:, diagonal, diagonal] += weight_P
    return local


def _solve_scaled(matrix_BPP: Floats, right_BP: Floats, free_BP: np.ndarray) -> Floats:
    """Solve on the free variables after scaling by the diagonal; others get 0."""
    diagonal = np.arange(matrix_BPP.shape[1])
    scale_BP = np.sqrt(np.abs(matrix_BPP[:, diagonal, diagonal]))
    scale_BP = np.where(free_BP & (scale_BP > 0), 1.0 / np.where(scale_BP > 0, scale_BP, 1.0), 0.0)
    scaled_BPP = matrix_BPP * scale_BP[:, :, None] * scale_BP[:, None, :]
    scaled_BPP[:, diagonal, diagonal] += np.where(scale_BP > 0, 1e-14, 1.0)
    right_BP1 = (right_BP * scale_BP)[..., None]
    try:
        solved_BP1 = np.linalg.solve(scaled_BPP, right_BP1)
    except np.linalg.LinAlgError:  # one exactly singular row refuses the whole batch
        scaled_BPP[:, diagonal, diagonal] += 1e-7
        solved_BP1 = np.linalg.solve(scaled_BPP, right_BP1)
    return np.asarray(solved_BP1[..., 0] * scale_BP, dtype=np.float64)


def _step(problem: Problem, theta_BP: Floats, local: _Local, mu_B: Floats) -> tuple[Floats, Floats]:
    """A bounded step (B, P), and the decrease that its gradient promises (B,)."""
    x_BP = theta_BP.copy()
    marked = problem.log_coefficient_P
    low_P, high_P = problem.low_P, problem.high_P
    gradient_BP = local.gradient_BP
    free_BP = ~((x_BP <= low_P) & (gradient_BP > 0) | (x_BP >= high_P) & (gradient_BP < 0)) & (low_P < high_P)
    matrix_BPP = local.hessian_BPP + mu_B[:, None, None] * local.majoriser_BPP
    step_BP = _solve_scaled(matrix_BPP, -gradient_BP, free_BP)
    limit_low, limit_high = np.where(marked, -3.0, low_P - x_BP), np.where(marked, 3.0, high_P - x_BP)
    out_BP = ((step_BP < limit_low) | (step_BP > limit_high)) & free_BP
    if out_BP.any():  # set the violators on their bound and solve for the others once more
        rows = out_BP.any(axis=1)
        pinned = np.where(out_BP, np.clip(step_BP, limit_low, limit_high), 0.0)[rows]
        right = -gradient_BP[rows] - (matrix_BPP[rows] @ pinned[..., None])[..., 0]
        step_BP[rows] = pinned + _solve_scaled(matrix_BPP[rows], right, (free_BP & ~out_BP)[rows])
        step_BP = np.clip(step_BP, limit_low, limit_high)
    moved_BP = np.where(
        marked, x_BP * np.exp(np.where(marked, step_BP, 0.0)), np.clip(x_BP + step_BP, low_P, high_P)
    )
    return moved_BP, -np.einsum("bp,bp->b", gradient_BP, step_BP)


def minimise(
    problem: Problem,
    theta_BP: Floats,
    weight_BN: Floats,
    delta: float,
    *,
    tolerance: float = 1e-12,
    max_steps: int = 60,
) -> tuple[Floats, Floats]:
    """Local minima (B, P) and their objectives (B,) from the starts `theta_BP` under the rows' weights (B,
    N).

    A row stops when its step promises less than `tolerance` of its objective.
    """
    theta_BP = np.clip(theta_BP, problem.low_P, problem.high_P)
    local = local_model(problem, theta_BP, weight_BN, delta)
    mu_B = np.full(len(theta_BP), 1e-2)
    active = np.arange(len(theta_BP))
    for _ in range(max_steps):
        here = _Local(
            local.value_B[active],
            local.gradient_BP[active],
            local.hessian_BPP[active],
            local.majoriser_BPP[active],
        )
        moved, promised = _step(problem, theta_BP[active], here, mu_B[active])
        there = local_model(problem, moved, weight_BN[active], delta)
        better = there.value_B < here.value_B
        rows = active[better]
        theta_BP[rows] = moved[better]
        local.put(rows, there, better)
        mu_B[active] = np.where(
            better, np.maximum(mu_B[active] * 0.1, 1e-12), np.maximum(mu_B[active] * 8.0, 1e-3)
        )
        small = np.abs(promised) <= tolerance * here.value_B + 1e-300
        active = active[~(small | (mu_B[active] > 1e9))]
        if not len(active):
            break
    return theta_BP, local.value_B


def descend(
    problem: Problem,
    theta_BP: Floats,
    weight_BN: Floats,
    *,
    first_delta: float,
    ratio: float = 5.0,
    tolerance: float = 1e-11,
) -> tuple[Floats, Floats]:
    """Minima at the objective's delta by way of larger ones: first_delta, first_delta/ratio, ... (graduated
    non-convexity).

    With few residuals inside +-delta the sum is nearly an L1 norm, whose Newton steps mean little until the
    points that the law passes through are known; a shrinking delta finds them.
    """
    target = problem.objective.huber_delta
    delta = first_delta
    while delta > target * 1.0001:
        theta_BP, _ = minimise(problem, theta_BP, weight_BN, delta, tolerance=1e-4, max_steps=8)
        delta = max(delta / ratio, target)
    return minimise(problem, theta_BP, weight_BN, target, tolerance=tolerance)
