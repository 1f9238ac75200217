"""Rolling backtests: fit the smaller runs, predict the next, and learn how wrong the form is beyond its data (D.8).

A cut is a row of weights: 1 where a point is fitted, 0 where it is held back, so the refits of all cuts, and their
bootstraps, are one batch. Letters: C cuts, B replicates, N points, P parameters, G values of tau.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from escala.laws.initial_values import grid_starts
from escala.laws.intervals import bootstrap_weights, inflation, quantile_pair, residual_draws
from escala.laws.powers import Features, Floats, losses
from escala.laws.rolling import Cut, Rolling, distance, extrapolation, trimmed
from escala.laws.sample import FEWEST_UNITS
from escala.laws.solve import Problem, descend, minimise, residuals

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the points, fitted
SMALLEST_GAP = 1e-4  # between the logs of two values that a cut can part
NEAR = 0.05  # of the points: a cut moves so far to the widest gap between two values
REPLICATES = 30  # of each cut
STARTS = 5
DRAWS = 300  # of an error's interval

# What is believed of a form's bias before its own backtests are seen: some 0.5 % of the loss at e times the data, to
# a factor of 4.5 either way; chosen on synthetic laws of wrong forms (benchmarks/README.md).
PRIOR_MEDIAN, PRIOR_SD = 0.005, 1.5
TAU_G = np.exp(np.linspace(np.log(2e-4), np.log(0.5), 80))
DEGREES = 3.0  # of Student's t of an error: a cut may be off by far, e.g. where its own law is not identified
MEDIAN_VARIANCE = np.pi / 2  # of a median, over that of a mean, of normal errors
RECENT = 2.0  # power of the share of points fitted, by which a cut counts: later ones are nearer to the law's future


@dataclass(frozen=True)
class _Split:
    """Which points a cut fits and which it is tested on, as masks."""

    by: str
    largest: float
    train_N: np.ndarray
    test_N: np.ndarray


@dataclass(frozen=True)
class _Judged:
    """A cut's errors at its tested points T, the sd of its fit there, its noise, and the distances."""

    split: _Split
    error_T: Floats
    spread_BT: Floats  # replicates less the point fit, in logs
    noise_N: Floats  # residuals of the points fitted, inflated
    factor_T: Floats
    distance_T: Floats
    unit_T: np.ndarray

    def log_likelihood_G(self, seen_N: np.ndarray) -> Floats:
        """Of each tau, from the median error at the points `seen_N`: what the errors of one cut have in common."""
        kept_T = seen_N[self.split.test_N]
        if not kept_T.any():
            return np.zeros(len(TAU_G))
        low, high = np.quantile(np.median(self.spread_BT[:, kept_T], axis=1), [0.16, 0.84])
        noise = (
            MEDIAN_VARIANCE * float(np.mean(trimmed(self.noise_N) ** 2)) / len(np.unique(self.unit_T[kept_T]))
        )
        grown_G = TAU_G * float(np.sqrt(self.distance_T[kept_T]).mean())
        variance_G = ((high - low) / 2) ** 2 + noise + grown_G**2 + 1e-12
        squared_G = float(np.median(self.error_T[kept_T])) ** 2 / variance_G
        log_G = -0.5 * np.log(variance_G) - (DEGREES + 1) / 2 * np.log1p(squared_G / DEGREES)
        out: Floats = log_G * (self.split.train_N.sum() / seen_N.sum()) ** RECENT
        return out


def calibrate(
    problem: Problem,
    columns: Mapping[str, Floats],
    compute_N: Floats | None,
    unit_N: np.ndarray,
    count: int,
    seed: int,
) -> Rolling:
    """The law's past: refits of the smaller points of `problem`, and what they leave likely of the form's bias.

    Args:
        columns: the points' inputs by the names that cuts are said in; compute_N: their FLOPs, None: not known.
        unit_N: which points are resampled together.
        count: replicates of the law, each of which gets a draw of the bias.
        seed: of the cuts' bootstraps.
    """
    axes = dict(columns) if compute_N is None else {**columns, "compute_flops": compute_N}
    free = int((problem.low_P < problem.high_P).sum())
    splits = _splits(axes, unit_N, free + 2)
    rng = np.random.default_rng([seed, 1])
    judged = _judge(problem, splits, axes, unit_N, free, rng) if splits else []
    cuts = [_cut(each, _past(judged, each.split.train_N), rng) for each in judged]
    return Rolling(tuple(cuts), bias_draws(_past(judged, np.ones(len(unit_N), dtype=bool)), count, rng))


def _past(judged: Sequence[_Judged], seen_N: np.ndarray) -> list[Floats]:
    """What the cuts say of tau to one who has seen only these points: of the refits to fewer, the errors among them."""
    inner = [each for each in judged if not (each.split.train_N & ~seen_N).any()]
    return [each.log_likelihood_G(seen_N) for each in inner]


def bias_draws(log_CG: Sequence[Floats], count: int, rng: np.random.Generator) -> Floats:
    """`count` draws of the bias at distance 1: tau from its posterior under the cuts' likelihoods, times a normal."""
    if not count:
        return np.empty(0)
    log_G = -0.5 * (np.log(TAU_G / PRIOR_MEDIAN) / PRIOR_SD) ** 2 + sum(log_CG, np.zeros(len(TAU_G)))
    share_G = np.exp(log_G - log_G.max())
    share_G /= share_G.sum()
    middle_B = (np.arange(count) + 0.5) / count
    log_tau_B = np.interp(rng.permutation(middle_B), np.cumsum(share_G) - share_G / 2, np.log(TAU_G))
    normal_B = np.array([NormalDist().inv_cdf(each) for each in middle_B.tolist()])
    draws_B: Floats = np.exp(log_tau_B) * normal_B
    return draws_B


def _splits(axes: Mapping[str, Floats], unit_N: np.ndarray, fewest: int) -> list[_Split]:
    """Cuts along each axis, each asked of the points up to the next; none twice, none that could not be resampled."""
    found = dict[bytes, _Split]()
    for name, value_N in axes.items():
        largest_C = [
            v for v in _places(value_N, fewest) if len(np.unique(unit_N[value_N <= v])) >= FEWEST_UNITS
        ]
        for largest, reach in pairwise([*largest_C, np.inf]):
            train_N = value_N <= largest
            found.setdefault(train_N.tobytes(), _Split(name, largest, train_N, ~train_N & (value_N <= reach)))
    return list(found.values())


def _places(value_N: Floats, fewest: int) -> list[float]:
    """The largest value of each cut along an axis: at the widest gap near each share, `fewest` points or more below."""
    sorted_N = np.sort(value_N)
    n, gap_N = len(sorted_N), np.diff(np.log(sorted_N))
    places = [i for i in range(fewest, n) if gap_N[i - 1] > SMALLEST_GAP]  # so many points are below
    if not places:
        return []
    found = set[float]()
    for wanted in (share * n for share in SHARES):
        near = [i for i in places if abs(i - wanted) <= max(1.0, NEAR * n)]
        near = near or [min(places, key=lambda i: abs(i - wanted))]
        found.add(float(sorted_N[max(near, key=lambda i: float(gap_N[i - 1])) - 1]))
    return sorted(found)


def _judge(
    problem: Problem,
    splits: Sequence[_Split],
    axes: Mapping[str, Floats],
    unit_N: np.ndarray,
    free: int,
    rng: np.random.Generator,
) -> list[_Judged]:
    theta_CP = _fits(problem, splits)
    loss_CN = losses(problem.form, theta_CP, problem.features)
    weight_CBN = np.stack([_weights(split, unit_N, rng) for split in splits])
    out = []
    rows = max(30_000 // (len(problem.loss_N) * REPLICATES), 1)  # the rows of a batch stay in the cache
    for at in range(0, len(splits), rows):
        weight_BN = weight_CBN[at : at + rows].reshape(-1, len(problem.loss_N))
        start_BP = np.repeat(theta_CP[at : at + rows], REPLICATES, axis=0)
        delta = problem.objective.huber_delta
        first = max(_typical(problem, loss_CN[at : at + rows], splits[at : at + rows]), delta)
        theta_BP, _ = descend(
            problem, start_BP, weight_BN, first_delta=min(3 * first, 20 * delta), ratio=4.0, tolerance=1e-4
        )
        replicate_BN = losses(problem.form, theta_BP, problem.features)
        for i, split in enumerate(splits[at : at + rows]):
            one = _one(
                problem,
                split,
                axes,
                loss_CN[at + i],
                replicate_BN[i * REPLICATES : (i + 1) * REPLICATES],
                unit_N,
                free,
            )
            out += [] if one is None else [one]
    return out


def _typical(problem: Problem, loss_CN: Floats, splits: Sequence[_Split]) -> float:
    """Median over the cuts of their points' median absolute residual."""
    size_CN = np.abs(residuals(problem, loss_CN))
    return float(np.median([np.median(size_N[s.train_N]) for size_N, s in zip(size_CN, splits, strict=True)]))


def _fits(problem: Problem, splits: Sequence[_Split]) -> Floats:
    """The point fit (C, P) of each cut: the best of several starts, from a grid of its own."""
    start_BP = np.concatenate([_starts(problem, split) for split in splits])
    weight_BN = np.repeat(np.stack([s.train_N for s in splits]).astype(np.float64), STARTS, axis=0)
    loss_CN = losses(problem.form, start_BP[::STARTS], problem.features)
    spread = max(2 * _typical(problem, loss_CN, splits), problem.objective.huber_delta)
    theta_BP, value_B = minimise(problem, start_BP, weight_BN, spread, tolerance=1e-3, max_steps=15)
    order_CS = np.argsort(value_B.reshape(-1, STARTS), axis=1)[:, :2]
    kept_B = (order_CS + STARTS * np.arange(len(splits))[:, None]).reshape(-1)
    theta_BP, value_B = descend(problem, theta_BP[kept_B], weight_BN[kept_B], first_delta=spread / 3)
    best_C = 2 * np.arange(len(splits)) + np.argmin(value_B.reshape(-1, 2), axis=1)
    best_CP: Floats = theta_BP[best_C]
    return best_CP


def _starts(problem: Problem, split: _Split) -> Floats:
    """STARTS rows of parameters, in the coordinates of the whole problem."""
    f = problem.features
    some = Features(
        f.main_KN[:, split.train_N],
        None if f.mix_N is None else f.mix_N[split.train_N],
        f.offset_K,
        f.mix_offset,
    )
    found = grid_starts(replace(problem, features=some, loss_N=problem.loss_N[split.train_N]), STARTS)
    return np.resize(found, (STARTS, found.shape[1]))


def _weights(split: _Split, unit_N: np.ndarray, rng: np.random.Generator) -> Floats:
    """Bootstrap weights (REPLICATES, N) of the points fitted; 0 elsewhere."""
    weight_BN = np.zeros((REPLICATES, len(unit_N)))
    units = np.unique(unit_N[split.train_N], return_inverse=True)[1]
    weight_BN[:, split.train_N] = bootstrap_weights(REPLICATES, units, rng)
    return weight_BN


def _one(
    problem: Problem,
    split: _Split,
    axes: Mapping[str, Floats],
    loss_N: Floats,
    replicate_BN: Floats,
    unit_N: np.ndarray,
    free: int,
) -> _Judged | None:
    """The errors of one cut; None where its law is no law (a loss that is not positive, replicates that do not end)."""
    train_N, test_N = split.train_N, split.test_N
    if not (np.isfinite(loss_N).all() and (loss_N > 0).all()):
        return None
    spread_BT = np.log(np.maximum(replicate_BN[:, test_N], 1e-12)) - np.log(loss_N[test_N])
    spread_BT = spread_BT[np.isfinite(spread_BT).all(axis=1)]
    if len(spread_BT) < REPLICATES // 2:
        return None
    ranges = {name: (float(v[train_N].min()), float(v[train_N].max())) for name, v in axes.items()}
    factors = extrapolation(ranges, {name: v[test_N] for name, v in axes.items()})
    noise_N = (np.log(problem.loss_N) - np.log(loss_N))[train_N] * inflation(int(train_N.sum()), free)
    return _Judged(
        split,
        np.log(problem.loss_N[test_N]) - np.log(loss_N[test_N]),
        spread_BT,
        noise_N,
        np.maximum.reduce(list(factors.values())),
        distance(factors),
        unit_N[test_N],
    )


def _cut(judged: _Judged, known: Sequence[Floats], rng: np.random.Generator) -> Cut:
    """The record: each error beside the interval that the cuts before it would have given."""
    spread_BT = np.resize(judged.spread_BT, (DRAWS, len(judged.error_T)))
    noise_B = trimmed(residual_draws(judged.noise_N, DRAWS, 0, rng))
    bias_B = rng.permutation(bias_draws(known, DRAWS, rng))
    draws_BT = spread_BT + noise_B[:, None] + bias_B[:, None] * np.sqrt(judged.distance_T)
    ends = [quantile_pair(draws_B, 0.9) for draws_B in draws_BT.T]
    split = judged.split
    return Cut(
        split.by,
        split.largest,
        int(split.train_N.sum()),
        tuple(np.flatnonzero(split.test_N).tolist()),
        tuple(judged.factor_T.tolist()),
        tuple(judged.error_T.tolist()),
        tuple(min(low, 0.0) for low, _ in ends),
        tuple(max(high, 0.0) for _, high in ends),
    )
