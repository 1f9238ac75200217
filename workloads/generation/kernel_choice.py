"""Which kernel multiplies by which matrices: measured here, or told by whom the results must agree with.

A kernel is chosen for each form in which the model's matrices are stored (`linear.form_of`), twice: for the rows of
responses, and for the tiles of prompts. The fastest wins whose result does not depend on the batch (docs/theory A.9).
A choice as text, `fp32=packed/plain;int8=halves/halves`, is what a weight version and a job's manifest keep.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from escala.contract.errors import SpecError
from workloads.generation.linear import KERNELS, Kernel, Matrix, cancelling, form_of, on_cpu
from workloads.generation.row_counts import ANY, LARGE, RowCounts, probe
from workloads.model.kernels import fastest

MEMORY_BYTES = 1 << 28  # of fp32 matrices: more than a cache holds, in 4 bits too
FLOPS = 2e9  # of one timed call where arithmetic, not memory, takes the time
SECONDS = 1.0
NEARER = 0.95  # another kernel than the first must take less of its time: near ties would fall either way
FEW_ROWS = 4  # a kernel that takes rows one by one is timed for engines of so many at most


@dataclass(frozen=True)
class Pair:
    """Names of kernels: for rows of responses, and for tiles of prompts."""

    rows: str
    tiles: str


Kernels = Mapping[str, Pair]
"""By form."""


@dataclass(frozen=True)
class EngineLimits:
    """What an engine computes at once: rows of responses, and tokens of prompts."""

    rows: int
    tile_rows: int

    @property
    def most(self) -> int:
        """Rows of one product, as far as they are tried."""
        return min(max(self.rows, self.tile_rows), LARGE[-1])


@dataclass(frozen=True)
class KernelTiming:
    """Seconds of the best call of each kernel that was timed, for matrices of one form and so many rows."""

    form: str
    rows: int
    seconds: Mapping[str, float]


class Product:
    """x W^T of one matrix by a pair of kernels."""

    def __init__(self, matrix: Matrix, pair: Pair, limits: EngineLimits) -> None:
        laid = {name: KERNELS[name].lay(matrix) for name in dict.fromkeys((pair.rows, pair.tiles))}
        self._rows, self._tiles = (
            (laid[name].multiply, counts_of(KERNELS[name], matrix, limits) or ANY)
            for name in (pair.rows, pair.tiles)
        )
        kept = matrix.nbytes if any(each.reads_matrix for each in laid.values()) else 0
        self.nbytes = kept + sum(each.nbytes for each in laid.values())

    def __call__(self, x_NI: Tensor, tiled: bool = False) -> Tensor:
        """(N, O) of (N, I). A row has the same bits whatever the others are; tiled or not, they may be others."""
        multiply, counts = self._tiles if tiled else self._rows
        return counts.apply(multiply, x_NI)


def to_text(kernels: Kernels) -> str:
    """`form=rows/tiles;...`, forms in alphabetical order."""
    return ";".join(f"{form}={pair.rows}/{pair.tiles}" for form, pair in sorted(kernels.items()))


def of_text(text: str) -> Kernels:
    """The choice that `to_text` wrote. Raises SpecError where it is none, or names a kernel that there is not."""
    found = {}
    for part in text.split(";"):
        form, _, names = part.partition("=")
        rows, _, tiles = names.partition("/")
        for name in (rows, tiles):
            if name not in KERNELS:
                raise SpecError(
                    f"The choice of kernels {text!r} names {name!r}, which there is not.",
                    f"Kernels are {', '.join(KERNELS)}: form=rows/tiles;..., or leave it out to measure.",
                )
        found[form] = Pair(rows, tiles)
    return found


def counts_of(kernel: Kernel, matrix: Matrix, limits: EngineLimits) -> RowCounts | None:
    """For how many rows at once `kernel` gives the same bits; None: it cannot, or does for none.

    On a GPU any number is taken: the batch may move a result's last bits there, which nothing here prevents.
    """
    if not kernel.takes(matrix):
        return None
    if kernel.by_rows or not on_cpu(matrix):
        return ANY
    key = (kernel.name, form_of(matrix), tuple(matrix.shape), limits.most, torch.get_num_threads())
    if key not in _PROBED:
        dtype = matrix.dtype if isinstance(matrix, Tensor) else torch.float32
        _PROBED[key] = probe(kernel.lay(cancelling(matrix)).multiply, matrix.shape[1], dtype, limits.most)
    return _PROBED[key]


_PROBED: dict[tuple[object, ...], RowCounts | None] = {}
"""A property of this machine, torch and number of threads, so that it is tried once a process."""


def first(matrices: Sequence[Matrix], limits: EngineLimits) -> Kernels:
    """The first kernel of each form that can, without a measurement."""
    return {form: Pair(*[next(_able(some, limits))] * 2) for form, some in _by_form(matrices).items()}


def follow(text: str, matrices: Sequence[Matrix], limits: EngineLimits) -> Kernels:
    """A choice that was made elsewhere.

    Raises SpecError where it cannot be followed here: a form of these matrices is not in it, or a kernel is not to be
    had on this machine, or does not give the same bits in every batch.
    """
    told = of_text(text)
    for form, some in _by_form(matrices).items():
        if form not in told:
            raise SpecError(
                f"The choice of kernels {text!r} says nothing of matrices in {form}.",
                "It was made for another precision: leave it out to measure.",
            )
        able = set(_able(some, limits))
        for name in (told[form].rows, told[form].tiles):
            if name not in able:
                raise SpecError(
                    f"Kernel {name} was chosen for matrices in {form}, and this machine has none whose results do not "
                    "depend on the batch.",
                    f"It can: {', '.join(sorted(able))}. Use machines of one kind, or start a service of its own.",
                )
    return {form: told[form] for form in _by_form(matrices)}


def measure(
    matrices: Sequence[Matrix], limits: EngineLimits, seconds: float = SECONDS
) -> tuple[Kernels, list[KernelTiming]]:
    """The fastest kernels here, and what they were chosen by.

    For rows the geometric mean of the times at one row and at `limits.rows` counts: nobody knows how full the batch
    will be. Near ties go to the first.

    Args:
        matrices: in the model's order, as they are multiplied by. Some are timed, the last only if of its own form.
        limits: of the engine.
        seconds: for all of them together.
    """
    forms = _by_form(matrices)
    timings, chosen = [], {}
    share = seconds / len(forms) / 3
    for form, some in forms.items():
        inner = (
            some[:-1] if len(some) > 1 and some[-1] is matrices[-1] else some
        )  # prompts skip the output product
        able = {name: KERNELS[name] for name in _able(some, limits)}
        names = {}
        for use, counts in {"rows": {1, limits.rows}, "tiles": {min(limits.tile_rows, LARGE[-1])}}.items():
            few = use == "rows" and limits.rows <= FEW_ROWS
            candidates = [name for name, kernel in able.items() if few or not kernel.by_rows]
            each = [_time(form, inner, candidates, rows, limits, share) for rows in sorted(counts)]
            timings += each
            names[use] = _best(candidates or list(able)[:1], each)
        chosen[form] = Pair(**names)
    return chosen, timings


def _best(names: Sequence[str], timings: Sequence[KernelTiming]) -> str:
    mean = {name: math.prod(each.seconds[name] for each in timings) for name in names}
    least = min(mean, key=mean.__getitem__)
    near = NEARER ** -len(timings)
    return next(name for name in names if mean[name] <= mean[least] * near)


def _time(
    form: str,
    matrices: Sequence[Matrix],
    names: Sequence[str],
    rows: int,
    limits: EngineLimits,
    seconds: float,
) -> KernelTiming:
    """Products of successive matrices, each read from memory where few rows are multiplied."""
    if len(names) == 1:
        return KernelTiming(form, rows, dict.fromkeys(names, 0.0))
    flops = [2 * rows * math.prod(matrix.shape) for matrix in matrices]
    enough = 2 * rows * MEMORY_BYTES / 4 if rows == 1 else FLOPS
    count = 1 + sum(total < enough for total in itertools.accumulate(flops))
    some = matrices[:count]
    x_NI = {matrix.shape[1]: torch.randn(rows, matrix.shape[1]).to(_activations(matrix)) for matrix in some}
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        products = [(Product(m, Pair(name, name), limits), x_NI[m.shape[1]]) for m in some]
        calls[name] = functools.partial(_multiply_all, products)
    alone = torch.get_num_threads() == 1 and on_cpu(some[0])
    with torch.inference_mode():
        return KernelTiming(
            form, rows, fastest(calls, seconds, time.thread_time if alone else time.perf_counter)[1]
        )


def _multiply_all(products: Sequence[tuple[Product, Tensor]]) -> None:
    for product, x_NI in products:
        product(x_NI)


def _activations(matrix: Matrix) -> torch.dtype:
    return matrix.dtype if isinstance(matrix, Tensor) else torch.float32


def _by_form(matrices: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    found: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        found.setdefault(form_of(matrix), []).append(matrix)
    return found


def _able(matrices: Sequence[Matrix], limits: EngineLimits) -> Iterator[str]:
    """Kernels that can multiply by each of them with a result that the batch does not change."""
    shapes = {tuple(matrix.shape): matrix for matrix in matrices}
    for name, kernel in KERNELS.items():
        if all(counts_of(kernel, matrix, limits) is not None for matrix in shapes.values()):
            yield name
