"""For how many rows at once a kernel adds up a row as it does for any other number: found by trying.

A request's text may not depend on what else is in its batch (docs/theory A.9), so neither may a row of a product on the
other rows. Kernels keep that for some numbers of rows and not for others: MKL's add up otherwise below 4 rows, FBGEMM's
where a last block has one or two (1, 2, 7, 31), oneDNN's with AMX beyond the number that the layout was made for. So a
kernel's rows are computed for many numbers at once, compared bit by bit, and other numbers are never computed at once:
they are cut into parts, and the last part is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]
SMALL = (*range(1, 17), 20, 24, 28, 31, 32)
LARGE = (64, 128, 256, 512)
ODD = (33, 47, 100, 161, 255)  # tried so as to see that no number at all matters
BLOCKS = (8, 4, 16, 32)  # rows at once that give the bits which all other numbers must give
SEED = 5
OUTPUTS = 256  # of a matrix that is made up, other than each other
LEAST_BITS = 12.0  # the smallest of a row's numbers are so many bits below the largest


@dataclass(frozen=True)
class RowCounts:
    """The numbers of rows that may be computed at once.

    Args:
        good: ascending; the first are small.
        free: any number may.
    """

    good: tuple[int, ...]
    free: bool

    def parts(self, rows: int) -> Iterator[tuple[int, int]]:
        """(rows, rows after padding) of each part of `rows`."""
        while rows and not self.free and rows not in self.good:
            fits = next((good for good in self.good if good >= rows), None)
            if fits is not None and fits <= max(SMALL[-1], self.good[0]):
                yield rows, fits
                return
            part = max((good for good in self.good if good <= rows), default=self.good[-1])
            yield part, part
            rows -= part
        if rows:
            yield rows, rows

    def apply(self, multiply: Multiply, x_NI: Tensor) -> Tensor:
        """`multiply` of all rows, in parts."""
        rows = len(x_NI)
        if self.free or rows in self.good:
            return multiply(x_NI)
        parts = list(self.parts(rows))
        done = [
            multiply(F.pad(x, (0, 0, 0, padded - size)))[:size]
            for x, (size, padded) in zip(torch.split(x_NI, [size for size, _ in parts]), parts, strict=True)
        ]
        return done[0] if len(done) == 1 else torch.cat(done)


ANY = RowCounts((), True)


def probe(multiply: Multiply, inputs: int, dtype: torch.dtype, most: int) -> RowCounts | None:
    """Which numbers of rows, up to `most` at once, give a row the same bits; None where there are none.

    The bits that count are those of blocks of BLOCKS rows, in which a row has the same bits at every place.

    Args:
        multiply: by a matrix; by one of `cancelling_numbers`, also where results are rounded to 16 bits.
    """
    most = max(most, BLOCKS[0])
    tried = [n for n in sorted({*SMALL, *LARGE, *ODD}) if n <= most]
    x_NI = _rows(max(*tried, BLOCKS[0]), inputs).to(dtype)
    with torch.inference_mode():
        block = next((b for b in BLOCKS if _is_steady(multiply, x_NI, b)), None)
        if block is None:
            return None
        wanted_NO = _in_blocks(multiply, x_NI, block)
        good = [n for n in tried if torch.equal(multiply(x_NI[-n:].clone()), wanted_NO[-n:])]
    allowed = tuple(n for n in good if n not in ODD)
    return RowCounts(allowed, len(good) == len(tried)) if allowed else None


def cancelling_numbers(outputs: int, inputs: int, most: int) -> Tensor:
    """(O, I) whole numbers from -most to most, int8: products with `probe`'s rows are 0 but for what adding up has
    rounded. Rounded to 16 bits, a sum of any other numbers would hide in what order it was added up.
    """
    generator = torch.Generator().manual_seed(SEED + 1)
    size = (min(outputs, OUTPUTS), inputs // 2)
    half_OH = torch.randint(-most, most + 1, size, generator=generator, dtype=torch.int8)
    return _spread(half_OH, -half_OH, inputs).repeat(-(-outputs // size[0]), 1)[:outputs].contiguous()


def _rows(rows: int, inputs: int) -> Tensor:
    """Random numbers in equal pairs, from large to small: where a small one is added, a sum is rounded."""
    generator = torch.Generator().manual_seed(SEED)
    half_NH = torch.randn(rows, inputs // 2, generator=generator)
    half_NH *= torch.exp2(-LEAST_BITS * torch.rand(half_NH.shape, generator=generator))
    return _spread(half_NH, half_NH, inputs)


def _spread(first_NH: Tensor, second_NH: Tensor, inputs: int) -> Tensor:
    """Both halves, (N, inputs), each pair of numbers anywhere; where `inputs` is odd, 0 beside them."""
    both_NI = torch.cat([first_NH, second_NH], 1)
    places = torch.randperm(both_NI.shape[1], generator=torch.Generator().manual_seed(SEED))
    return F.pad(both_NI[:, places], (0, inputs - both_NI.shape[1]))


def _in_blocks(multiply: Multiply, x_NI: Tensor, block: int) -> Tensor:
    """The product in whole blocks, the last one padded."""
    padded_NI = F.pad(x_NI, (0, 0, 0, -len(x_NI) % block))
    return torch.cat([multiply(x) for x in torch.split(padded_NI, block)])[: len(x_NI)]


def _is_steady(multiply: Multiply, x_NI: Tensor, block: int) -> bool:
    """Whether a row has the same bits at every place of a block."""
    x_NI = F.pad(x_NI, (0, 0, 0, max(0, block - len(x_NI))))[:block]
    wanted_NO = multiply(x_NI)
    return all(
        torch.equal(multiply(x_NI.roll(places, 0)), wanted_NO.roll(places, 0)) for places in range(1, block)
    )
