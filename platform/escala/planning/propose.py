"""Which run next: the one that most shrinks the interval of the mean loss (or of N*) at a target, per unit of cost.

Every bootstrap replicate of the law predicts the quantity of interest m at the target and the log loss y at
each candidate, so their covariance over the ensemble says what a measurement would teach. A Gaussian posterior
gives it in closed form; `METHOD` has the formula and its sources (and docs/theory D.8: the interval of the MEAN).

The covariance is of winsorised draws, so that the few replicates in which a term nearly vanishes do not lead it.
Over 40 synthetic laws (not those of benchmarks/propose.py) the raw covariance needed 17 % and that of ranks 26 %
more FLOPs to the same width, with a standard error of some 12 %. What did not help, as the geometric mean over 16
other laws of FLOPs over a common reference (0.82 to 0.90 as it is, same error): the fit's Fisher information instead
of the bootstrap (1.14), the cheapest run of the plan first (1.12), a shadow price of 41 steps instead of 13 (0.99,
though its plans are 13 % cheaper where the truth's information is known), and plans that look at most 24 (0.87,
0.91) or 12 (1.28) runs ahead.
Letters: B replicates, K candidates; index 0 of a covariance is the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from escala.contract.errors import LawError
from escala.laws.intervals import quantile_pair
from escala.laws.law import Law
from escala.laws.powers import Floats
from escala.planning import split
from escala.planning.allocate import allocate
from escala.planning.limits import Budget, Limits

METHOD = (
    "information = 1/2 ln(Var m / Var(m | y)) nats, Var(m | y) = Var m - Cov(m, y)^2 / (Var y + sigma^2), over the "
    "law's bootstrap (MacKay 1992; Chaloner & Verdinelli 1995; Cohn, Ghahramani & Jordan 1996); ranked by "
    "information / (cost + overhead), after Snoek et al. 2012. The overhead is the shadow price of a run: the "
    "least for which such runs reach the wanted width within the runs that are left."
)

WINSOR = 0.05  # share of draws pulled in at each end
WINSOR_VARIANCE = 0.8314  # of a standard normal that is so treated
ONE_SIGMA = 0.6827  # this quantile of |residual| is sigma; the median would sit on the zeros of a near-L1 fit
SMALLEST_SIGMA = 1e-4  # of log loss; no training run repeats itself more closely
NEAREST_GOAL = 0.9  # of the present width: a goal nearer than this (or passed) says nothing about a plan
OVERHEADS = (0.0, *np.geomspace(1e-3, 1.0, 13))  # shadow prices tried, in units of the dearest candidate

Columns = dict[str, Floats]
Cost = Callable[[Columns], Floats] | Sequence[float] | Floats


@dataclass(frozen=True)
class Proposal:
    """A run to make. Widths are relative, of the 90 % interval at the target, `width_expected` after this run
    and those before it in the batch; `low_nats` to `high_nats` is where its loss should fall (90 %).
    """

    n_active: float
    n_total: float
    tokens: float
    context_tokens: float | None
    compute_flops: float
    cost: float
    unit: str
    width_now: float
    width_expected: float
    information_nats: float
    information_per_cost: float
    predicted_loss_nats: float
    low_nats: float | None
    high_nats: float | None


def candidates(
    law: Law,
    max_flops: float,
    *,
    min_flops: float | None = None,
    tokens_per_parameter: tuple[float, float] = (2.0, 200.0),
    reach: float = 30.0,
    context_tokens: Sequence[float] = (),
    n_total_over_active: float = 1.0,
    steps: int = 13,
) -> Columns:
    """Runs worth considering, as columns of one length: a log grid over compute and D/N.

    Args:
        max_flops: of one run, 6 N_active D.
        min_flops: of one run; by default the smallest run of the law, at most max_flops / 10.
        tokens_per_parameter: bounds of D/N_active.
        reach: N stays within this factor of the law's smallest and largest N.
        context_tokens: contexts to cross with the grid; a law of T needs them.
        n_total_over_active: experts, for a law of mixtures.

    Raises:
        LawError: bounds that leave no run, or a form without a split of N and D.
    """
    law.form.check_split()
    if "context_tokens" in law.form.columns and not len(context_tokens):
        raise LawError(
            "This law depends on the context T.",
            "Fit a law of runs that share one context; in Python candidates(context_tokens=[512, 2048]).",
        )
    if min_flops is None:
        min_flops = min(law.ranges.get("compute_flops", (max_flops / 1000,))[0], max_flops / 10)
    bounds = (min_flops, max_flops, *tokens_per_parameter, reach, n_total_over_active, *context_tokens)
    if not (np.isfinite(bounds).all() and min(bounds) > 0 and min_flops <= max_flops and steps >= 2):
        raise LawError(
            f"Runs from {min_flops:g} to {max_flops:g} FLOPs, D/N {tokens_per_parameter}: no such range.",
            "Give positive bounds, the smaller one first.",
        )
    axes = [np.geomspace(min_flops, max_flops, steps), np.geomspace(*tokens_per_parameter, steps)]
    axes.append(np.array(list(context_tokens) or [1.0]))
    distinct = [np.unique(axis) for axis in axes]
    flops_K, ratio_K, context_K = (axis.ravel() for axis in np.meshgrid(*distinct, indexing="ij"))
    n_active_K = np.sqrt(flops_K / 6 / ratio_K)
    columns = {
        "n_active": n_active_K,
        "n_total": n_active_K * n_total_over_active,
        "tokens": flops_K / 6 / n_active_K,
        "compute_flops": flops_K,
    }
    if len(context_tokens):
        columns["context_tokens"] = context_K
    columns.setdefault(law.size, n_active_K)  # n_non_embedding: then that is the N of 6 N D
    low, high = law.ranges.get(law.size, (0.0, math.inf))
    kept_K = (columns[law.size] >= low / reach) & (columns[law.size] <= high * reach)
    if not kept_K.any():
        raise LawError(
            f"No run of {min_flops:g} to {max_flops:g} FLOPs has N within {reach:g}x of the law's.",
            "Raise --max-flops.",
        )
    return {name: column_K[kept_K] for name, column_K in columns.items()}


def propose(
    law: Law,
    target: Mapping[str, float] | Budget | float,
    candidates: Mapping[str, Floats],
    *,
    aim: str = "loss",
    count: int = 1,
    width: float | None = None,
    runs: int = 24,
    cost: Cost | None = None,
    unit: str = "FLOP",
) -> list[Proposal]:
    """The `count` next runs, best first; each is chosen as if those before it had been measured.

    The cheapest runs always have the best ratio of information to cost, even where hundreds would be needed.
    So the choice looks ahead: see `shadow_price`.

    Args:
        target: a point (n_active=, tokens=, ...); or a budget, whose optimum (`allocate`'s) is the point; a number is
            a budget in FLOPs.
        candidates: columns of one length, e.g. from `candidates`.
        aim: "loss", the mean loss at the target; "n_active", the optimal N of a budget.
        width: the relative width of the 90 % interval that is wanted in the end; half the present one by default.
        runs: how many runs may be made until then.
        cost: of each candidate, in `unit`: an array, or a function of the columns; 6 N D by default.

    Raises:
        LawError: no bootstrap, an unknown aim, a target that the law cannot read, or a cost that is not positive.
    """
    _check(law, aim, count, width, runs)
    columns = _read_columns(law, candidates)
    cost_K = _costs(cost, columns)
    if count > len(cost_K):
        raise LawError(
            f"{count} runs of {len(cost_K)} candidates.", "Ask for fewer, or widen the candidates."
        )
    value, draws_B, kept_B = _interest(law, target, aim)
    low, high = quantile_pair(np.exp(draws_B), 0.9)
    width_now = (high - low) / value
    draws_BK = np.log(law.evaluate(law.replicates_BP[kept_B], columns))
    covariance = winsorised_covariance(np.column_stack([draws_B, draws_BK]))
    if not covariance[0, 0] > 0:
        raise LawError(
            "All replicates agree on the target: there is nothing to learn.",
            "Fit the law with fewer parameters held fixed, or propose for another target.",
        )
    noise = noise_variance(law)
    wanted = min(width or width_now / 2, NEAREST_GOAL * width_now)
    goal = covariance[0, 0] * (wanted / width_now) ** 2
    prior, open_K, out = covariance[0, 0], np.ones(len(cost_K), dtype=bool), []
    for made in range(count):
        overhead = shadow_price(covariance, cost_K, noise, goal, max(runs - made, 1))
        information_K = information(covariance, noise)
        k = int(np.argmax(np.where(open_K, information_K / (cost_K + overhead), -1.0)))
        covariance = observe(covariance, k, noise)
        open_K[k] = False  # a repeat teaches no more than a neighbour, and cannot show a lack of fit
        expected = width_now * math.sqrt(covariance[0, 0] / prior)
        gained = float(information_K[k])
        out.append(_proposal(law, columns, k, float(cost_K[k]), unit, width_now, expected, gained))
    return out


def winsorised_covariance(draws_BK: Floats) -> Floats:
    """Covariance (K, K) of draws whose tails are pulled in to their quantiles, rescaled for a normal."""
    low_K, high_K = np.quantile(draws_BK, [WINSOR, 1 - WINSOR], axis=0)
    inside_BK = np.clip(draws_BK, low_K, high_K)
    inside_BK -= inside_BK.mean(axis=0)
    out: Floats = inside_BK.T @ inside_BK / max(len(inside_BK) - 1, 1) / WINSOR_VARIANCE
    return out


def noise_variance(law: Law) -> float:
    """sigma^2 of one run's log loss as the law's objective feels it.

    sigma comes robustly from the inflated residuals. With delta below sigma Huber's estimate is nearly a median,
    which needs up to pi/2 as many runs: the factor is its asymptotic variance (Huber 1964).
    """
    residual_B, delta = np.abs(law.residual_draws_B), law.objective.huber_delta
    if law.objective.space == "linear":
        typical = float(np.median(law.points["loss_nats"]))
        residual_B, delta = residual_B / typical, delta / typical
    sigma = max(float(np.quantile(residual_B, ONE_SIGMA)), SMALLEST_SIGMA)
    k = delta / sigma
    inside, density = math.erf(k / math.sqrt(2)), math.exp(-k * k / 2) / math.sqrt(2 * math.pi)
    factor = (inside - 2 * k * density + k * k * (1 - inside)) / inside**2 if k > 1e-3 else math.pi / 2
    return sigma**2 * factor


def information(covariance: Floats, noise: float) -> Floats:
    """What each candidate would tell of the target, (K,) nats; see `METHOD`. 0 where they are uncorrelated."""
    explained_K = covariance[0, 1:] ** 2 / (np.diag(covariance)[1:] + noise)
    share_K = np.clip(explained_K / covariance[0, 0], 0.0, 1.0 - 1e-12)
    out: Floats = -0.5 * np.log1p(-share_K)
    return out


def observe(covariance: Floats, k: int, noise: float) -> Floats:
    """The covariance once candidate `k` is measured; what the loss turns out to be does not matter to it."""
    column = covariance[k + 1]
    out: Floats = covariance - np.outer(column, column) / (covariance[k + 1, k + 1] + noise)
    return out


def shadow_price(covariance: Floats, cost_K: Floats, noise: float, goal: float, runs: int) -> float:
    """The least overhead per run, in the unit of cost, with which greedy runs bring Var m to `goal` in time.

    At 0 greedy runs are the cheapest there are; the dearer a run as such, the more each is asked to teach. It is
    the Lagrange multiplier of the limit on runs. Where no price reaches the goal: the highest.
    """
    prices = [float(share * cost_K.max()) for share in OVERHEADS]
    for price in prices:
        left = covariance
        for _ in range(runs):
            k = int(np.argmax(information(left, noise) / (cost_K + price)))
            left = observe(left, k, noise)
            if left[0, 0] <= goal:
                return price
    return prices[-1]


def _check(law: Law, aim: str, count: int, width: float | None, runs: int) -> None:
    if len(law.replicates_BP) < 20:
        raise LawError(
            f"A proposal needs a bootstrap; this law has {len(law.replicates_BP)} replicates.",
            "Fit it with `escala laws fit --bootstrap 1000`; the law's findings say where more runs are needed.",
        )
    if aim not in ("loss", "n_active"):
        raise LawError(f"There is no aim '{aim}'.", "Choose loss or n_active.")
    if count < 1 or runs < 1:
        raise LawError(f"count = {count} and runs = {runs} must be at least 1.", "Ask for one run.")
    if width is not None and not (math.isfinite(width) and width > 0):
        raise LawError(f"A width of {width} cannot be reached.", "It is relative, e.g. 0.05 for 5 %.")


def _read_columns(law: Law, candidates: Mapping[str, Floats]) -> Columns:
    columns = {name: np.asarray(column, dtype=np.float64) for name, column in candidates.items()}
    needed = {law.size if name == "size" else name for name in law.form.columns} | {"n_active", "tokens"}
    missing = sorted(needed - set(columns))
    if missing:
        raise LawError(f"The candidates lack {', '.join(missing)}.", "candidates() gives every column.")
    if len({column.shape for column in columns.values()}) > 1 or not len(columns["tokens"]):
        raise LawError("The candidates' columns differ in length, or are empty.", "Give one row per run.")
    if not all((np.isfinite(column) & (column > 0)).all() for column in columns.values()):
        raise LawError("A candidate's input is not a positive number.", "Give counts, not logs.")
    return columns


def _costs(cost: Cost | None, columns: Columns) -> Floats:
    given = cost(columns) if callable(cost) else cost
    default_K = 6 * columns["n_active"] * columns["tokens"]
    cost_K = default_K if given is None else np.asarray(given, dtype=np.float64)
    if cost_K.shape != default_K.shape:
        raise LawError(
            f"{cost_K.size} costs for {default_K.size} candidates.", "Give one cost per candidate."
        )
    if not (np.isfinite(cost_K).all() and (cost_K > 0).all()):
        raise LawError("A candidate's cost is not a positive number.", "Give FLOPs, dollars or kWh per run.")
    return cost_K


def _interest(
    law: Law, target: Mapping[str, float] | Budget | float, aim: str
) -> tuple[float, Floats, np.ndarray]:
    """The quantity at the target, its log in every usable replicate (B,), and which those are."""
    if isinstance(target, Mapping):
        if aim == "n_active":
            raise LawError("The optimal N belongs to a budget, not to a point.", "Give the target in FLOPs.")
        return _loss_at(law, target)
    budget = target if isinstance(target, Budget) else Budget(Limits(compute_flops=float(target)))
    best = allocate(law, **vars(budget))
    if aim == "loss":
        return _loss_at(law, best.point(law.size))
    kept_B, sizes_B = split.optimal_sizes(law, budget)
    if kept_B.sum() < 20:
        raise LawError("Hardly a replicate has an optimal N.", "Measure runs that vary both N and D.")
    return best.n_active, np.log(sizes_B), kept_B


def _loss_at(law: Law, point: Mapping[str, float]) -> tuple[float, Floats, np.ndarray]:
    columns = law.columns_of(point)
    draws_B = np.log(law.evaluate(law.replicates_BP, columns)[:, 0])
    return float(law.curve(columns)[0]), draws_B, np.ones(len(draws_B), dtype=bool)


def _proposal(
    law: Law,
    columns: Columns,
    k: int,
    cost: float,
    unit: str,
    width_now: float,
    width_expected: float,
    information_nats: float,
) -> Proposal:
    point = {name: float(column_K[k]) for name, column_K in columns.items()}
    predicted = law.predict(0.9, **point)
    return Proposal(
        n_active=point["n_active"],
        n_total=point.get("n_total", point["n_active"]),
        tokens=point["tokens"],
        context_tokens=point.get("context_tokens"),
        compute_flops=6 * point["n_active"] * point["tokens"],
        cost=cost,
        unit=unit,
        width_now=width_now,
        width_expected=width_expected,
        information_nats=information_nats,
        information_per_cost=information_nats / cost,
        predicted_loss_nats=predicted.loss_nats,
        low_nats=predicted.low_nats,
        high_nats=predicted.high_nats,
    )
