"""How many independent measurements a table holds: what the bootstrap resamples, and whether it can.

Copies of a row, checkpoints of one run and rows of one group say less than as many separate runs. They are resampled
together; where too few units are left, no interval is better than one that is too narrow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from escala.laws.inputs import SIZES
from escala.laws.powers import Floats

Ints = NDArray[np.intp]

FEWEST_UNITS = 8  # with fewer, percentile intervals of a bootstrap are far too narrow, whatever the level
FEWEST_EFFECTIVE = (
    4.0  # (sum of rows)^2 / sum of squared rows over the units: one group may hold nearly all of them
)
DIGITS = 4  # significant digits of inputs and loss that make a row a copy: what %.4g writes
UNEVEN = 0.5  # of the units count: below that the copies are spread unevenly, and the fit leans on a few rows
RUN_WORDS = frozenset(
    {"run", "runs", "runid", "runname", "trial", "trialid", "experiment", "exp", "wandb", "uid"}
)
RUN_WORDS_ALONE = frozenset({"name", "id", "job_id", "jobid", "uuid"})
FOLLOWING, FOLLOWING_SIGMAS = (
    0.5,
    2.6,
)  # correlation of neighbours' residuals along D that tells rows of one run


@dataclass(frozen=True)
class Sample:
    """`unit_N`: rows with one number are resampled together. `problems` make a law unhealthy, `notes` do not."""

    unit_N: Ints
    rows: int  # without copies
    by: str | None  # the column whose values were taken together, given or found
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def units(self) -> int:
        """How many independent units there are."""
        return int(self.unit_N.max()) + 1

    @property
    def resamplable(self) -> bool:
        """Whether a bootstrap over the units gives intervals that can be trusted."""
        return self.units >= FEWEST_UNITS and _effective(self.unit_N) >= FEWEST_EFFECTIVE


def effective_sample(
    points: pd.DataFrame, columns: Mapping[str, Floats], loss_N: Floats, group: str | None
) -> Sample:
    """The units of a table: by `group`, else by a column that names runs, else row by row; copies count once."""
    copy_N = _copies(points, columns, loss_N)
    rows = int(copy_N.max()) + 1
    problems, notes = list[str](), list[str]()
    found = group or _run_column(points, columns, copy_N)
    if group is None and found is not None:
        problems.append(
            f"rows share a value of {found}: they look like points of one run, which are not independent; they were "
            f"resampled together; say so with --group {found}, or keep each run's last row"
        )
    if rows < len(loss_N):
        notes.append(
            f"{len(loss_N) - rows} of {len(loss_N)} rows are copies: inputs and loss as in another row; "
            "the intervals count each once"
        )
        if group is None and _effective(copy_N) < UNEVEN * rows:
            problems.append("some rows are repeated far more often than others, and the fit leans on them")
    unit_N = copy_N if found is None else _connected(_codes(points, found), copy_N)
    return _checked(Sample(unit_N, rows, found, tuple(problems), tuple(notes)))


def by_curve(sample: Sample, columns: Mapping[str, Floats], residual_N: Floats) -> Sample:
    """The sample again, once the fit's residuals are known: rows of one N whose neighbours along D miss in the same
    direction are points of one run (or the form misses that N), so rows of one N are resampled together.
    """
    if sample.by is not None or "tokens" not in columns:
        return sample
    curve_N = _factorize(np.stack([v for k, v in columns.items() if k != "tokens"], axis=1))
    order = np.lexsort((columns["tokens"], curve_N))
    order = order[np.sort(np.unique(sample.unit_N[order], return_index=True)[1])]  # a copy is no neighbour
    here, there = order[:-1], order[1:]
    pair = (curve_N[here] == curve_N[there]) & (columns["tokens"][here] < columns["tokens"][there])
    a, b = residual_N[here[pair]], residual_N[there[pair]]
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    following = float((a * b).sum()) / scale if scale > 0 else 0.0
    if following <= FOLLOWING or following * np.sqrt(len(a)) <= FOLLOWING_SIGMAS:
        return sample
    said = (
        f"residuals of rows that differ only in tokens go together (correlation {following:.2f}): they look like "
        "points of one run, so they were resampled together; name the runs in a column and give it as --group"
    )
    unit_N = _connected(curve_N, sample.unit_N)
    return _checked(replace(sample, unit_N=unit_N, by="curve", problems=(*sample.problems, said)))


def _checked(sample: Sample) -> Sample:
    """The sample with what is wrong with its size."""
    if sample.resamplable:
        return sample
    n, effective = sample.units, _effective(sample.unit_N)
    unit = "row" if sample.by is None else "group"
    many = f"{n} {unit}{'s' if n > 1 else ''}" + (
        f" of very unequal size (as good as {effective:.1f})" if n >= FEWEST_UNITS else ""
    )
    said = f"no intervals: {many} cannot be resampled; at least {FEWEST_UNITS} are needed"
    return replace(sample, problems=(*sample.problems, said))


def _effective(unit_N: Ints) -> float:
    sizes = np.bincount(unit_N).astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _copies(points: pd.DataFrame, columns: Mapping[str, Floats], loss_N: Floats) -> Ints:
    """A number for each row; copies share it: inputs and loss equal to DIGITS digits. Rows of different seeds are
    copies where the loss is wholly the same: short losses of separate runs may agree.
    """
    inputs = [_rounded(values) for values in columns.values()]
    copy_N = _factorize(np.stack([*inputs, _rounded(loss_N)], axis=1))
    if "seed" not in points:
        return copy_N
    same_seed_N = _factorize(np.stack([copy_N, _codes(points, "seed")], axis=1).astype(np.float64))
    return _connected(same_seed_N, _factorize(np.stack([*inputs, loss_N], axis=1)))


def _rounded(values_N: Floats) -> Floats:
    """To DIGITS significant digits, as whole numbers of their last digit, beside the power of ten."""
    power_N = np.floor(np.log10(values_N)) - (DIGITS - 1)
    rounded: Floats = np.round(np.log(np.round(values_N / 10.0**power_N) * 10.0**power_N) * 1e6)
    return rounded


def _factorize(rows: Floats) -> Ints:
    """Numbers from 0 in the order of first appearance; equal rows share one."""
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.intp)
    rank[np.argsort(first)] = np.arange(len(first))
    return np.asarray(rank[inverse.ravel()])


def _codes(points: pd.DataFrame, column: str) -> Ints:
    """Numbers from 0 for a column's values; each empty cell is a value of its own."""
    codes = np.asarray(pd.factorize(points[column])[0], dtype=np.intp)
    empty = codes < 0
    codes[empty] = codes.max(initial=-1) + 1 + np.arange(int(empty.sum()))
    return codes


def _connected(group_N: Ints, copy_N: Ints) -> Ints:
    """Units of rows that share a group or are copies, also by way of others; in the order of first appearance."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    groups, n = int(group_N.max()) + 1, int(group_N.max()) + int(copy_N.max()) + 2
    graph = coo_array((np.ones(len(group_N)), (group_N, groups + copy_N)), shape=(n, n))
    return np.asarray(pd.factorize(connected_components(graph, directed=False)[1][group_N])[0])


def _run_column(points: pd.DataFrame, columns: Mapping[str, Floats], copy_N: Ints) -> str | None:
    """The first column that names runs and has repeats (copies apart); None where there is none, or each row has its
    own run.
    """
    first = np.sort(np.unique(copy_N, return_index=True)[1])
    inputs = columns if "tokens" in columns else {n: points[n].to_numpy() for n in SIZES if n in points}
    fixed = [values[first] for name, values in inputs.items() if name != "tokens"]
    for name in sorted((str(c) for c in points.columns), key=lambda c: c != "run_id"):
        words = set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
        sure, alone = bool(words & RUN_WORDS), name.lower() in RUN_WORDS_ALONE
        if not (sure or alone) or name in columns or points[name].isna().all():
            continue
        codes = _codes(points.iloc[first], name)
        repeats = len(np.unique(codes)) < len(codes)
        if name == "run_id" or (sure and not repeats):
            return name if repeats else None
        if (
            repeats
            and codes.any()
            and _same_in_each(codes, fixed)
            and (sure or _curves(codes, fixed, columns, first))
        ):
            return name
    return None


def _same_in_each(codes: Ints, fixed: Sequence[Floats]) -> bool:
    """Whether rows of one value have one N (and T, ...) throughout, as points of one run have."""
    order = np.argsort(codes, kind="stable")
    same = codes[order][1:] == codes[order][:-1]
    return all(np.allclose(v[order][1:][same], v[order][:-1][same], rtol=1e-3) for v in fixed)


def _curves(codes: Ints, fixed: Sequence[Floats], columns: Mapping[str, Floats], first: Ints) -> bool:
    """Whether a column that may name anything names runs: each value has its points at several D, and it says more than
    N (and T, ...) do, as 125M does not: rows of such a name may be separate runs.
    """
    if "tokens" not in columns:
        return False
    labels = len(np.unique(codes)) == len(np.unique(np.stack(fixed, axis=1), axis=0)) if fixed else True
    pairs = np.stack([codes.astype(np.float64), columns["tokens"][first]], axis=1)
    return not labels and len(np.unique(pairs, axis=0)) == len(codes)
