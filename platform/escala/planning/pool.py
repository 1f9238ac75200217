"""Which rows of a pool (a table of runs that could be made, with costs) to buy for the stated target rows.

A plan spends a whole budget so that the EXPECTED SQUARED ERROR of the fit at the targets is least, per cost
(docs/theory D.8; compare arXiv:2604.22753). The error is that of the estimator which is used, a fit of the form with
equal weights, where the truth is the form plus

- a smooth departure from it, which grows with the distance between rows (a Gaussian process in the logs of the
  inputs), so that many cheap rows far from the targets agree with one another and mislead (Box & Draper 1959);
- an effect of each curve (rows that differ in tokens alone: one shape, or checkpoints of one run);
- noise of each row.

Parameters have a weak prior, so there is a plan before the first loss is known; a bootstrap of so few rows would be
worth nothing. After each part of the budget the parameters are estimated again and the rest is planned again.

Letters: K rows of the pool (chosen ones too), T targets, P parameters. Log parameters: L_inf, each coefficient at the
centre of the rows, each exponent; the mix's rho as it is. All errors are of log loss, so relative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from escala.contract.errors import LawError
from escala.laws.form import EXPONENT_BOUNDS, Form
from escala.laws.powers import Features, Floats, loss_and_jacobian, losses, make_features, to_natural

FLOOR_SHARE = 0.55  # of the loss at the centre that L_inf has before data; the terms share the rest
EXPONENT = 0.33  # Hoffmann et al. 2022: 0.34 and 0.28
SD_FLOOR, SD_COEFFICIENT, SD_EXPONENT, SD_MIX = 0.5, 1.0, 0.5, 0.3  # of the prior; the first three in logs
DEPARTURE, CURVE, NOISE = 0.01, 0.005, 0.001  # sd in log loss of what the form does not say
REACH = math.log(10.0)  # over this distance in the logs of the inputs a departure changes
PRICES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)  # a row's cost as such, in units of the dearest row's
PARTS = (0.1, 0.3, 0.6, 1.0)  # of the budget, after each of which the rest is planned again
MOST_STEPS = 4000  # of greedy choice in one exploration: bounds its time
SPARE = 2  # rows beside one per parameter that a law has, where the budget allows
STEPS = 60  # of Gauss-Newton
ROUNDS = 3  # of the variance of a row, in turn with the parameters
ROW_VARIANCE = DEPARTURE**2 + CURVE**2 + NOISE**2
ROW_WEIGHT = 2.0  # rows that the prior of that variance is worth

Measure = Callable[[int], float]


@dataclass(frozen=True)
class Pool:
    """Rows that could be made and the targets: columns of the form's inputs (positive), and the cost of each row."""

    form: Form
    rows: Mapping[str, Floats]  # (K,) each
    targets: Mapping[str, Floats]  # (T,) each
    cost_K: Floats

    def __post_init__(self) -> None:
        """Raises LawError for no rows, no targets, or a number that is not positive."""
        for what, columns in (("pool", self.rows), ("targets", self.targets)):
            if not len(columns[self.form.columns[0]]):
                raise LawError(f"The {what} has no row.", "Give a table with at least one row.")
            for name in self.form.columns:
                _positive(columns[name], f"{name} of the {what}", "Give counts, not logs.")
        _positive(self.cost_K, "the cost", "Give each row what it costs, in FLOPs, dollars or hours.")

    @cached_property
    def features(self) -> Features:
        """Of the rows, then of the targets; centred."""
        both = {n: np.concatenate([self.rows[n], self.targets[n]]) for n in self.form.columns}
        return make_features(self.form, both)

    @cached_property
    def departure(self) -> Floats:
        """Covariance (K, K + T) of what the form does not say, without noise."""
        names = self.form.columns
        both = [np.concatenate([self.rows[n], self.targets[n]]) for n in names]
        log = [np.log(values) / REACH for values in both]
        count = len(self.cost_K)
        squared = sum((x[:count, None] - x[None, :]) ** 2 for x in log)
        same = np.full((count, len(both[0])), "tokens" in names and len(names) > 1)
        for name, values in zip(names, both, strict=True):
            same &= (values[:count, None] == values[None, :]) | (name == "tokens")
        out: Floats = DEPARTURE**2 * np.exp(-0.5 * np.asarray(squared)) + CURVE**2 * same
        return out


@dataclass(frozen=True)
class Purchase:
    """Rows in the order of choice, the loss of each (NaN: it has none that can be used), and what they cost."""

    rows: tuple[int, ...]
    losses: tuple[float, ...]
    spent: float


def explore_pool(pool: Pool, budget: float, measure: Measure) -> Purchase:
    """Spend at most `budget`, part by part; `measure` says the loss of a row, and is asked of chosen rows alone.

    The choice has nothing random: of rows that are worth the same the first is taken.

    Raises LawError where the budget buys no row.
    """
    if not (math.isfinite(budget) and budget >= pool.cost_K.min()):
        raise LawError(
            f"A budget of {budget:g} buys no row: the cheapest costs {pool.cost_K.min():g}.",
            "Raise the budget, or state it in the unit of the cost column.",
        )
    chosen, measured, spent, steps = list[int](), list[float](), 0.0, 0
    theta_P = prior_mean(pool.form)
    for part in PARTS:
        prices = PRICES if steps < MOST_STEPS // 4 else PRICES[2:3]
        following = plan(pool, theta_P, chosen, budget - spent, prices)
        if not following:
            break
        steps += len(following) * len(prices)
        last = part == 1.0
        order = following if last else sorted(following, key=lambda k: (pool.cost_K[k], k))
        for k in order:
            if not last and spent + pool.cost_K[k] > part * budget and len(chosen) > len(theta_P):
                break
            after = math.fsum([*pool.cost_K[chosen], pool.cost_K[k]])
            if after > budget:
                continue
            spent = after
            chosen.append(k)
            measured.append(measure(k))
        theta_P = estimate(pool, chosen, measured)
    return Purchase(tuple(chosen), tuple(measured), spent)


def plan(
    pool: Pool,
    theta_P: Floats,
    chosen: Sequence[int],
    budget: float,
    prices: Sequence[float] = PRICES,
    count: int | None = None,
) -> list[int]:
    """Rows to buy with `budget` (at most `count`) beside the chosen ones, in the order of choice.

    A greedy choice by error removed per cost takes hundreds of cheap rows first and may leave too little for a dear
    one; so each row is charged a price as such, and of the plans of all `prices` the one with the least error at the
    end is taken.
    """
    best, least = list[int](), math.inf
    start = _Pool.of(pool, theta_P, chosen)
    for price in prices:
        rows, error = _greedy(start, budget, price * float(pool.cost_K.max()), count)
        if error < least * (1 - 1e-9):
            best, least = rows, error
    return best


def expected_error(pool: Pool, theta_P: Floats, chosen: Sequence[int]) -> float:
    """Root of the expected mean squared relative error at the targets after a fit to the chosen rows."""
    return math.sqrt(_Pool.of(pool, theta_P, chosen).error())


def _greedy(start: _Pool, budget: float, price: float, count: int | None) -> tuple[list[int], float]:
    state, rows, left, error = start, list[int](), budget, start.error()
    cost_K = start.pool.cost_K
    while count is None or len(rows) < count:
        missing = len(start.fisher) + SPARE - state.bought
        open_K = state.open_K & (cost_K <= (left - _reserve(cost_K[state.open_K], missing - 1)) * (1 + 1e-12))
        if not open_K.any():
            open_K = state.open_K & (cost_K <= left * (1 + 1e-12))
        if not open_K.any():
            break
        among = np.flatnonzero(open_K)
        error_k = state.errors(among)
        at = int(np.argmax((error - error_k) / (cost_K[among] + price)))
        if error_k[at] >= error and missing <= 0:
            break
        error, k = float(error_k[at]), int(among[at])
        state, left = state.add(k), left - cost_K[k]
        rows.append(k)
    return rows, error


def _reserve(cost: Floats, missing: int) -> float:
    """What the cheapest `missing` rows cost: kept, so that the law has more rows than parameters."""
    return float(np.sort(cost)[:missing].sum()) if missing > 0 else 0.0


@dataclass(frozen=True)
class _Pool:
    """Sums over the chosen rows S, of the Jacobian J of the log loss and the covariance V of departures and noise:
    J_S'J_S, J_S'V_SS J_S (P, P), J_S'V (P, K + T).
    """

    pool: Pool
    jacobian: Floats  # (P, K + T)
    fisher: Floats
    spread: Floats
    reach: Floats
    open_K: np.ndarray
    bought: int = 0

    @classmethod
    def of(cls, pool: Pool, theta_P: Floats, chosen: Sequence[int]) -> _Pool:
        jacobian = _jacobian(pool.form, theta_P, pool.features)[1]
        size_P, none = len(theta_P), np.zeros((len(theta_P), len(theta_P)))
        state = cls(pool, jacobian, none, none, np.zeros((size_P, jacobian.shape[1])), pool.cost_K > 0)
        for k in chosen:
            state = state.add(k)
        return state

    def add(self, k: int) -> _Pool:
        """With row k. A row is bought once."""
        j_P = self.jacobian[:, k]
        cross = np.outer(j_P, self.reach[:, k])
        own = self.pool.departure[k, k] + NOISE**2
        open_K = self.open_K.copy()
        open_K[k] = False
        return replace(
            self,
            fisher=self.fisher + np.outer(j_P, j_P),
            spread=self.spread + cross + cross.T + np.outer(j_P, j_P) * own,
            reach=self.reach + np.outer(j_P, self.pool.departure[k]),
            open_K=open_K,
            bought=self.bought + 1,
        )

    def error(self) -> float:
        """Expected mean squared error at the targets."""
        count = len(self.pool.cost_K)
        return float(self._mean_square(self.fisher[None], self.spread[None], self.reach[None, :, count:])[0])

    def errors(self, among: np.ndarray) -> Floats:
        """`error` with each of the rows `among` added, (len(among),)."""
        count = len(self.pool.cost_K)
        j_kP, reach_kP = self.jacobian[:, among].T, self.reach[:, among].T
        outer = j_kP[:, :, None] * j_kP[:, None, :]
        cross = j_kP[:, :, None] * reach_kP[:, None, :]
        own = self.pool.departure[among, among] + NOISE**2
        spread = self.spread + cross + cross.transpose(0, 2, 1) + outer * own[:, None, None]
        to_targets = (
            self.reach[None, :, count:] + j_kP[:, :, None] * self.pool.departure[among][:, None, count:]
        )
        return self._mean_square(self.fisher + outer, spread, to_targets)

    def _mean_square(self, fisher: Floats, spread: Floats, to_targets: Floats) -> Floats:
        """E (J_t F^-1 (J_S'e_S - Q x) - e_t)^2, mean over t: F = J_S'J_S + Q, Q the prior's precision times the
        variance of a row, x the parameters' distance from the prior.
        """
        pool, target = self.pool, self.jacobian[:, len(self.pool.cost_K) :]
        row = DEPARTURE**2 + CURVE**2 + NOISE**2
        sd_P = prior_sd(pool.form)
        precision = np.diag(row / sd_P**2)
        gain = np.linalg.solve(fisher + precision, np.broadcast_to(target, (len(fisher), *target.shape)))
        about = np.einsum("kpt,kpq,kqt->kt", gain, spread + precision @ np.diag(sd_P**2) @ precision, gain)
        shared = np.einsum("kpt,kpt->kt", gain, to_targets)
        out: Floats = (about - 2 * shared).mean(axis=1) + DEPARTURE**2 + CURVE**2
        return out


def prior_mean(form: Form, typical: float = 1.0) -> Floats:
    """Log parameters before data, for losses of about `typical`."""
    k = len(form.coefficients)
    theta_P = np.full(len(form.names), math.log(EXPONENT))
    theta_P[0] = math.log(FLOOR_SHARE * typical)
    theta_P[1:k] = math.log((1 - FLOOR_SHARE) / (k - 1) * typical)
    if form.mix is not None:
        theta_P[-1] = sum(form.mix.bounds) / 2
    return theta_P


def prior_sd(form: Form) -> Floats:
    """Standard deviations beside `prior_mean`."""
    k = len(form.coefficients)
    sd_P = np.full(len(form.names), SD_EXPONENT)
    sd_P[0], sd_P[1:k] = SD_FLOOR, SD_COEFFICIENT
    if form.mix is not None:
        sd_P[-1] = SD_MIX
    return sd_P


def estimate(pool: Pool, chosen: Sequence[int], losses: Sequence[float]) -> Floats:
    """Log parameters that a plan is made about: the most probable ones under the prior (damped Gauss-Newton)."""
    usable = [(k, loss) for k, loss in zip(chosen, losses, strict=True) if math.isfinite(loss)]
    if not usable:
        return prior_mean(pool.form)
    rows, seen_N = np.array([k for k, _ in usable]), np.log([loss for _, loss in usable])
    mean_P = prior_mean(pool.form, float(np.exp(np.median(seen_N))))
    theta_P, row = mean_P, ROW_VARIANCE
    for _ in range(ROUNDS):
        theta_P, squared = _most_probable(pool, theta_P, rows, seen_N, mean_P, row)
        row = (ROW_WEIGHT * ROW_VARIANCE + squared) / (ROW_WEIGHT + len(rows))
    return theta_P


def _most_probable(
    pool: Pool, theta_P: Floats, rows: np.ndarray, seen_N: Floats, mean_P: Floats, row: float
) -> tuple[Floats, float]:
    """Log parameters of the greatest posterior where a row's log loss has variance `row`, and the sum of squares."""
    precision_P = row / prior_sd(pool.form) ** 2

    def value(theta_P: Floats) -> tuple[float, Floats, Floats]:
        log_loss, jacobian = _jacobian(pool.form, theta_P, pool.features)
        residual_N = seen_N - log_loss[rows]
        size = float(residual_N @ residual_N + precision_P @ (theta_P - mean_P) ** 2)
        return size, residual_N, jacobian[:, rows]

    damping = 1e-3
    size, residual_N, jacobian = value(theta_P)
    for _ in range(STEPS):
        hessian = jacobian @ jacobian.T + np.diag(precision_P)
        gradient = jacobian @ residual_N - precision_P * (theta_P - mean_P)
        step_P = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
        tried_P = _inside(pool.form, theta_P + step_P)
        found = value(tried_P)
        if found[0] < size:
            done = size - found[0] < 1e-10 * size
            theta_P, (size, residual_N, jacobian), damping = tried_P, found, damping / 5
            if done:
                break
        else:
            damping *= 5
    return theta_P, float(residual_N @ residual_N)


@dataclass(frozen=True)
class RowsFit:
    """The law of the bought rows: parameters of the formula, the loss of each target, and what a reader should know."""

    theta_P: Floats  # log parameters
    parameters: dict[str, float]
    predictions_T: Floats
    findings: tuple[str, ...]


def fit_rows(pool: Pool, chosen: Sequence[int], losses: Sequence[float]) -> RowsFit:
    """The most probable law of the rows under the weak prior, whose shrinkage is said: few rows alone would leave
    exponents at their bounds. With rows that determine it the prior's weight vanishes.
    """
    form, features = pool.form, pool.features
    theta_P = estimate(pool, chosen, losses)
    plain_P = _plain(form, theta_P)
    natural_P = to_natural(form, plain_P[None], features)[0]
    log_loss = _jacobian(form, theta_P, features)[0]
    usable = [(k, loss) for k, loss in zip(chosen, losses, strict=True) if math.isfinite(loss)]
    rows = np.array([k for k, _ in usable], dtype=np.intp)
    squared = float(((np.log([loss for _, loss in usable]) - log_loss[rows]) ** 2).sum())
    row = (ROW_WEIGHT * ROW_VARIANCE + squared) / (ROW_WEIGHT + len(rows))
    jacobian = _jacobian(form, theta_P, features)[1][:, rows]
    precision = np.diag(1 / prior_sd(form) ** 2)
    share_P = np.sqrt(np.diag(np.linalg.inv(jacobian @ jacobian.T / row + precision))) / prior_sd(form)
    said = ", ".join(f"{name} {share:.2f}" for name, share in zip(form.names, share_P, strict=True))
    finding = f"weak prior; posterior over prior standard deviation (1: nothing learnt): {said}"
    predictions_T = np.exp(log_loss[len(pool.cost_K) :])
    parameters = dict(zip(form.names, natural_P.tolist(), strict=True))
    return RowsFit(theta_P, parameters, predictions_T, (finding,))


def log_parameters(pool: Pool, parameters: Mapping[str, float]) -> Floats:
    """The log parameters of a law of the formula, at the pool's centre; a term that the fit lost has the prior's."""
    form, features = pool.form, pool.features
    natural_P = np.array([parameters[name] for name in form.names])
    plain_P = _centred(form, natural_P, features)
    typical = float(np.median(losses(form, plain_P[None], features)))
    out = prior_mean(form, typical)
    end = len(out) - (form.mix is not None)
    kept_P = plain_P > 1e-6 * typical
    kept_P[len(form.coefficients) :] = True
    out[:end][kept_P[:end]] = np.log(plain_P[:end][kept_P[:end]])
    out[end:] = plain_P[end:]
    return _inside(form, out)


def _centred(form: Form, natural_P: Floats, features: Features) -> Floats:
    """Parameters of the formula -> those of the centred features: the inverse of `powers.to_natural`."""
    unit = natural_P.copy()
    unit[: len(form.coefficients)] = 1.0
    out = natural_P.copy()
    k = len(form.coefficients)
    out[:k] = natural_P[:k] / to_natural(form, unit[None], features)[0][:k]
    return out


def _inside(form: Form, theta_P: Floats) -> Floats:
    k = len(form.coefficients)
    out = theta_P.copy()
    end = len(out) - (form.mix is not None)
    out[:k] = np.clip(out[:k], -20.0, 20.0)
    out[k:end] = np.clip(out[k:end], math.log(max(EXPONENT_BOUNDS[0], 0.02)), math.log(EXPONENT_BOUNDS[1]))
    if form.mix is not None:
        out[-1] = np.clip(out[-1], *form.mix.bounds)
    return out


def _plain(form: Form, theta_P: Floats) -> Floats:
    """Log parameters -> parameters of the centred features."""
    end = len(theta_P) - (form.mix is not None)
    out = theta_P.copy()
    out[:end] = np.exp(theta_P[:end])
    return out


def _jacobian(form: Form, theta_P: Floats, features: Features) -> tuple[Floats, Floats]:
    """Log loss (K + T,) and its derivatives (P, K + T) by log parameters."""
    end = len(theta_P) - (form.mix is not None)
    plain_P = _plain(form, theta_P)
    loss, slopes = (x[0] for x in loss_and_jacobian(form, plain_P[None], features))
    scale_P = np.ones_like(theta_P)
    scale_P[:end] = plain_P[:end]
    return np.log(loss), slopes * scale_P[:, None] / loss


def _positive(values: Floats, what: str, fix: str) -> None:
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
        raise LawError(f"{what} is not a positive number in row {bad[0]} ({values[bad[0]]:g}).", fix)
