"""FLOPs that escala.planning.propose needs for a wanted interval, against usual designs. Exit code 1 over the floor.

    nice -n 19 python benchmarks/propose.py --keep FOLDER        # 100 laws on 2 processes: over half an hour of CPU
    python benchmarks/propose.py --laws 20 --width 0.08 --each

100 laws, drawn about the published ones; for each, all designs start from the same 12 cheap runs (counted) and add
one run at a time, with the same noise, until the 90 % interval of the mean loss at the optimum of 1e21 FLOPs, by
escala's own fit and bootstrap, is at most --width wide. No run is above 1e18 FLOPs, below 1e15, or outside 2 to 200
tokens per parameter. Peers (each at several settings, of which its best on THAT law is taken, which nobody could
know beforehand): a grid over N and D, halved again and again, in the order of cost or at random; Sobol points;
isoFLOP slices; and greedy D-optimal runs for the current fit (Fedorov 1972), whatever they cost.

The figure: the median over laws of FLOPs(proposal) / FLOPs(best peer on that law). A proposal that does not arrive
within --runs counts as an infinite ratio, also where no peer arrives; a peer that does not arrive needs infinitely
many FLOPs. A peer that another has overtaken is not followed further: it cannot be the best (--each follows it, at
twice the CPU, for a line about each design by itself). With --keep the peers' outcomes are kept law by law, so that
a run goes on where it was stopped, and a changed proposal costs two seconds a law.

A design that stops by its own interval may stop on a narrow one by luck. So all designs, the peers too, stop by the
rule of `escala explore`: two narrow intervals in a row (--hold). The share of final intervals that hold the truth is
printed for all.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from escala.laws import Law, fit_law
from escala.planning.explore import LOOKS
from escala.planning.propose import candidates, propose

NOISE = 0.004  # of the loss, lognormal
TARGET_FLOPS, MOST_FLOPS, LEAST_FLOPS = 1e21, 1e18, 1e15
RATIOS = (2.0, 200.0)  # tokens per parameter
DEAREST = (1e17, 10**17.5, 1e18)  # the peers' settings: the dearest run that each may make
FLOOR = 0.6
COVERAGE = 0.84

Point = tuple[float, float]  # N, D
Laws = dict[tuple[Point, ...], Law]  # fits of one truth, by their runs: many designs begin alike
Design = Callable[["Study"], Point | None]


def true_law(seed: int) -> dict[str, float]:
    """L_inf 1 to 2.2, exponents 0.25 to 0.5; each term 0.4 to 1.2 nats at N = 1e8, D = 2e9 (Chinchilla: 0.8)."""
    rng = np.random.default_rng([7, seed])
    constant, (alpha, beta) = rng.uniform(1.0, 2.2), rng.uniform(0.25, 0.5, 2)
    by_n, by_d = np.exp(rng.uniform(np.log(0.4), np.log(1.2), 2))
    a, b = by_n * 1e8**alpha, by_d * 2e9**beta
    return {"L_inf": constant, "a": a, "b": b, "alpha": alpha, "beta": beta}


def at(flops: float, ratio: float) -> Point:
    """N and D of a budget at so many tokens per parameter."""
    size = float(np.sqrt(flops / 6 / ratio))
    return size, flops / 6 / size


class Study:
    """One law under one design: its runs so far, and what their fit says of the target."""

    def __init__(self, seed: int, bootstrap: int, width: float, runs: int, laws: Laws) -> None:
        self.truth, self.bootstrap, self.wanted, self.runs = true_law(seed), bootstrap, width, runs
        self.laws = laws
        self.noise = NOISE * np.random.default_rng([11, seed]).standard_normal(runs)
        alpha, beta, budget = self.truth["alpha"], self.truth["beta"], TARGET_FLOPS / 6
        balance = alpha * self.truth["a"] / (beta * self.truth["b"])
        size = (balance * budget**beta) ** (1 / (alpha + beta))
        self.target = {"n_active": size, "tokens": budget / size}
        self.points: list[Point] = []
        self.losses: list[float] = []
        for flops in (1e15, 3e15, 1e16):
            for ratio in (5.0, 10.0, 40.0, 80.0):
                self.measure(at(flops, ratio))

    def true_loss(self, size: float, tokens: float) -> float:
        t = self.truth
        return float(t["L_inf"] + t["a"] * size ** -t["alpha"] + t["b"] * tokens ** -t["beta"])

    def measure(self, point: Point) -> None:
        """One more run; the k-th run of every design meets the same noise."""
        self.losses.append(self.true_loss(*point) * float(np.exp(self.noise[len(self.points)])))
        self.points.append(point)

    def fit(self) -> float:
        """Fit all runs; the relative width of the interval of the mean at the target."""
        key = tuple(self.points)
        if key not in self.laws:
            table = pd.DataFrame(self.points, columns=["n_active", "tokens"]).assign(loss_nats=self.losses)
            self.laws[key] = fit_law(table, bootstrap=self.bootstrap)
        self.law: Law = self.laws[key]
        answer = self.law.predict_mean(0.9, **self.target)
        self.covered = bool(answer.low_nats <= self.true_loss(**_named(self.target)) <= answer.high_nats)
        return float((answer.high_nats - answer.low_nats) / answer.loss_nats)

    @property
    def flops(self) -> float:
        """Of all runs, the first 12 too."""
        return sum(6 * size * tokens for size, tokens in self.points)


def _named(target: dict[str, float]) -> dict[str, float]:
    return {"size": target["n_active"], "tokens": target["tokens"]}


def proposed(study: Study) -> Point:
    """What escala proposes."""
    columns = candidates(
        study.law, MOST_FLOPS, min_flops=LEAST_FLOPS, tokens_per_parameter=RATIOS, reach=100.0
    )
    left = study.runs - len(study.points)
    best = propose(study.law, study.target, columns, width=study.wanted, runs=left)[0]
    return best.n_active, best.tokens


def _allowed(size: float, tokens: float, dearest: float) -> bool:
    slack = 1 + 1e-9
    cheap = LEAST_FLOPS / slack <= 6 * size * tokens <= dearest * slack
    return cheap and RATIOS[0] / slack <= tokens / size <= RATIOS[1] * slack


def _in_box(u: float, v: float, dearest: float) -> Point:
    """A point of the unit square in the box of log N, log D that holds all allowed runs."""
    sizes = at(LEAST_FLOPS, RATIOS[1])[0], at(dearest, RATIOS[0])[0]
    tokens = at(LEAST_FLOPS, RATIOS[0])[1], at(dearest, RATIOS[1])[1]
    return float(sizes[0] * (sizes[1] / sizes[0]) ** u), float(tokens[0] * (tokens[1] / tokens[0]) ** v)


def grid(dearest: float, by_cost: bool) -> Iterator[Point]:
    """A 3 x 3 grid, then the new points of 5 x 5, 9 x 9, ...: each level by cost or at random."""
    seen: set[tuple[float, float]] = set()
    rng = np.random.default_rng(5)
    for level in range(1, 6):
        side = [float(u) for u in np.arange(2**level + 1) / 2**level]
        fresh = [(u, v) for u in side for v in side if (u, v) not in seen]
        seen.update(fresh)
        points = [p for p in (_in_box(u, v, dearest) for u, v in fresh) if _allowed(*p, dearest)]
        order = np.argsort([n * d for n, d in points]) if by_cost else rng.permutation(len(points))
        yield from (points[i] for i in order)


def sobol(dearest: float) -> Iterator[Point]:
    """Scrambled Sobol points of the allowed part of the box."""
    from scipy.stats import qmc

    points = (_in_box(u, v, dearest) for u, v in qmc.Sobol(2, rng=3).random(1024))
    return (p for p in points if _allowed(*p, dearest))


def isoflop(dearest: float, sizes: int) -> Iterator[Point]:
    """Slices of `sizes` N at half-decades of compute up to the dearest; then again between those N."""
    budgets = np.geomspace(LEAST_FLOPS, dearest, round(2 * np.log10(dearest / LEAST_FLOPS)) + 1)
    steps = np.log(RATIOS[1] / RATIOS[0]) / (sizes - 1)
    for shift in (0.0, 0.5, 0.25, 0.75, 0.125, 0.625):
        for budget in budgets:
            for i in range(sizes - (shift > 0)):
                yield at(float(budget), RATIOS[0] * float(np.exp((i + shift) * steps)))


def d_optimal(study: Study, dearest: float) -> Point:
    """The allowed run that most raises the determinant of the fit's Fisher information, at any cost."""
    columns = candidates(study.law, dearest, min_flops=LEAST_FLOPS, tokens_per_parameter=RATIOS, reach=100.0)
    size_N, tokens_N = np.array(study.points).T
    seen_PN, new_PK = _jacobian(study.law, size_N, tokens_N), _jacobian(study.law, **_sized(columns))
    fisher = seen_PN @ seen_PN.T
    fisher += 1e-10 * np.trace(fisher) * np.eye(5)  # a term that the fit lost is worth looking for
    k = int(np.argmax(np.einsum("pk,pk->k", new_PK, np.linalg.solve(fisher, new_PK))))
    return float(columns["n_active"][k]), float(columns["tokens"][k])


def _sized(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"size_N": columns["n_active"], "tokens_N": columns["tokens"]}


def _jacobian(law: Law, size_N: np.ndarray, tokens_N: np.ndarray) -> np.ndarray:
    """Of the log loss, by L_inf, log a, log b, alpha and beta; (5, N)."""
    p = law.parameters
    by_n, by_d = p["a"] * size_N ** -p["alpha"], p["b"] * tokens_N ** -p["beta"]
    rows = [np.ones_like(by_n), by_n, by_d, -by_n * np.log(size_N / 1e7), -by_d * np.log(tokens_N / 2e8)]
    return np.stack(rows) / (p["L_inf"] + by_n + by_d)


def peers() -> dict[str, list[Callable[[], Design]]]:
    """Each peer's settings; a design is made afresh for every law."""

    def sequence(points: Callable[[], Iterator[Point]]) -> Callable[[], Design]:
        def start() -> Design:
            iterator = points()
            return lambda study: next(iterator, None)

        return start

    return {
        "D-optimal": [lambda top=top: partial(d_optimal, dearest=top) for top in DEAREST],  # type: ignore[misc]
        "grid": [sequence(partial(grid, top, by_cost)) for top in DEAREST for by_cost in (True, False)],
        "Sobol": [sequence(partial(sobol, top)) for top in DEAREST],
        "isoFLOP": [sequence(partial(isoflop, top, sizes)) for top in DEAREST for sizes in (3, 5)],
    }


@dataclass(frozen=True)
class Outcome:
    """FLOPs to the wanted width (infinite: not reached), runs made, and whether the interval holds the truth."""

    flops: float
    runs: int
    covered: bool | None


def grow(
    seed: int, design: Design, options: argparse.Namespace, laws: Laws, most_flops: float = np.inf
) -> Outcome:
    """Add runs until the interval is narrow, or --runs or `most_flops` are spent."""
    study = Study(seed, options.bootstrap, options.width, options.runs, laws)
    held = 0
    while True:
        held = held + 1 if study.fit() <= options.width else 0
        if held >= options.hold:
            return Outcome(study.flops, len(study.points), study.covered)
        point = design(study) if len(study.points) < options.runs else None
        if point is None or study.flops + 6 * point[0] * point[1] >= most_flops:
            return Outcome(np.inf, len(study.points), None)
        study.measure(point)


def one_law(seed: int, options: argparse.Namespace) -> dict[str, Outcome]:
    """The proposal, and each peer's best setting on this law."""
    warnings.simplefilter("ignore")
    return {"proposal": grow(seed, proposed, options, {}), **kept_peers(seed, options)}


def kept_peers(seed: int, options: argparse.Namespace) -> dict[str, Outcome]:
    """As `best_peers`, from the folder --keep where they are there: they do not depend on the proposal."""
    if options.keep is None:
        return best_peers(seed, options)
    question = [options.width, options.runs, options.bootstrap, options.hold, int(options.each)]
    path = options.keep / f"{seed}-{'-'.join(map(str, question))}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({k: asdict(v) for k, v in best_peers(seed, options).items()}))
    return {name: Outcome(**data) for name, data in json.loads(path.read_text()).items()}


def best_peers(seed: int, options: argparse.Namespace) -> dict[str, Outcome]:
    """Each peer's best setting on this law, followed until it can no longer win: against the settings of the same
    peer with --each, else against all others too (one that is overtaken counts as not arrived).
    """
    out: dict[str, Outcome] = {}
    laws: Laws = {}
    for name, settings in peers().items():
        best = Outcome(np.inf, 0, None)
        others = np.inf if options.each else min((o.flops for o in out.values()), default=np.inf)
        for start in settings:
            found = grow(seed, start(), options, laws, min(best.flops, others))
            best = found if found.flops < best.flops else best
        out[name] = best
    return out


def ratios(results: list[dict[str, Outcome]], names: list[str]) -> np.ndarray:
    """FLOPs(proposal) / FLOPs(the best of `names`), per law; infinite where the proposal does not arrive."""
    ours = np.array([result["proposal"].flops for result in results])
    theirs = np.array([min(result[name].flops for name in names) for result in results])
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(ours), ours / theirs, np.inf)


def report(results: list[dict[str, Outcome]], width: float, each: bool) -> float:
    """Print a line per design (of peers with --each only), then what the best peers were; the figure."""
    names = [name for name in results[0] if name != "proposal"]
    for name in ["proposal", *(names if each else [])]:
        line = _line(name, [result[name] for result in results], width)
        if name != "proposal":
            line += f"; proposal needs {np.median(ratios(results, [name])):.2f} of it"
        print(line)
    winners = [min(names, key=lambda name: result[name].flops) for result in results]
    best = [result[name] for result, name in zip(results, winners, strict=True)]
    print(_line("best peer", best, width))
    print("best on so many laws: " + ", ".join(f"{name} {winners.count(name)}" for name in names))
    ratio_L = ratios(results, names)
    low, figure, high = np.quantile(ratio_L, [0.25, 0.5, 0.75], method="nearest")
    figure = float(np.median(ratio_L))
    print(
        f"of the best peer on each law: median {figure:.2f} (quartiles {low:.2f}, {high:.2f})   floor {FLOOR}"
    )
    print(f"laws on which the proposal is cheaper: {int((ratio_L < 1).sum())} of {len(ratio_L)}")
    return figure


def _line(name: str, outcomes: list[Outcome], width: float) -> str:
    arrived = [o for o in outcomes if np.isfinite(o.flops)]
    held = np.mean([o.covered for o in arrived]) if arrived else np.nan
    flops, runs = np.median([o.flops for o in outcomes]), np.median([o.runs for o in arrived] or [0])
    return (
        f"{name:10} median {flops:.2e} FLOPs, {runs:3.0f} runs; {len(outcomes) - len(arrived)} of {len(outcomes)} "
        f"did not reach {width:.0%}; coverage {held:.2f}"
    )


def main() -> int:
    """Print every number beside its floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--laws", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="seed of the first law")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=float, default=0.05, help="relative width of the 90 %% interval")
    parser.add_argument("--runs", type=int, default=60, help="runs that a design may make, the first 12 too")
    parser.add_argument("--bootstrap", type=int, default=100)
    parser.add_argument("--hold", type=int, default=LOOKS, help="narrow intervals in a row that end a design")
    parser.add_argument("--each", action="store_true", help="follow a peer that another has overtaken, too")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder of the peers' outcomes, to be removed where the fit or a peer has changed",
    )
    options = parser.parse_args()
    began, results = time.monotonic(), []
    with ProcessPoolExecutor(options.processes) as pool:
        seeds = range(options.first, options.first + options.laws)
        for result in pool.map(partial(one_law, options=options), seeds):
            results.append(result)
            if len(results) % 5 == 0:
                seconds = time.monotonic() - began
                print(f"{len(results)} of {options.laws} laws, {seconds:.0f} s", flush=True)
    figure = report(results, options.width, options.each)
    held = [o.covered for o in (result["proposal"] for result in results) if o.covered is not None]
    print(f"final intervals of the proposal that hold the truth: {np.mean(held):.2f}   floor {COVERAGE}")
    return int(figure > FLOOR or np.mean(held) < COVERAGE)


if __name__ == "__main__":
    sys.exit(main())
