"""How a mixture's slots lie for its products: each expert's own, or padded, so that experts in a row make one batch
(docs/theory B.8).

Dimensions: E experts, K experts of a token, N tokens, S slots sorted by expert, P places, those that are padding
included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from escala.schema.moe import ExpertKernel
from workloads.model.gate import Dispatch

SLICE_COST, CALL_ROWS = 1.12, 8.0
"""Of a product alone, in a batched one's time a row, and of a call in rows (AVX2, 256 rows an expert, 256 x 352)."""
LONGEST = 16
"""Experts of a run under `runs`: finding the runs takes time, too."""


@dataclass(frozen=True)
class Run:
    """Experts `first` to `last` - 1, computed together, each on `rows` places."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class SlotPlaces:
    """The places of all slots, run by run.

    Attributes:
        choice_P: which of the N K choices stands there; of padding, the first.
        place_NK: where a token's k-th expert answers; P: nowhere, it was dropped.
        filled_P1: 1 where there is a slot, 0 where there is padding; None: nothing is padded.
    """

    runs: tuple[Run, ...]
    choice_P: Tensor
    place_NK: Tensor
    filled_P1: Tensor | None


def runs_of(sizes: Sequence[int], kernel: ExpertKernel) -> tuple[Run, ...]:
    """Which experts are computed together, by their slots: slices: none; padded: all; runs: those in a row of which
    padding costs less than separate products.
    """
    if kernel == "padded":
        return (Run(0, len(sizes), max(sizes)),)
    if kernel == "slices":
        return tuple(Run(e, e + 1, size) for e, size in enumerate(sizes))
    best: list[tuple[float, tuple[Run, ...]]] = [(0.0, ())]
    for last in range(1, len(sizes) + 1):
        options, most = [], 0
        for first in range(last - 1, max(-1, last - 1 - LONGEST), -1):
            most = max(most, sizes[first])
            each = 1.0 if last - first > 1 else SLICE_COST
            cost, before = best[first]
            total = cost + each * (last - first) * most + CALL_ROWS
            options.append((total, (*before, Run(first, last, most))))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def lay_out(sent: Dispatch, kernel: ExpertKernel) -> SlotPlaces:
    """The places of `sent`'s slots."""
    runs = runs_of(sent.sizes, kernel)
    rows = [run.rows for run in runs for _ in range(run.first, run.last)]
    if rows == sent.sizes:
        return SlotPlaces(runs, sent.choice_S, sent.slot_NK, None)
    device, places = sent.choice_S.device, sum(rows)
    size_E, row_E = torch.tensor(sent.sizes, device=device), torch.tensor(rows, device=device)
    shift_E = (row_E.cumsum(0) - row_E) - (size_E.cumsum(0) - size_E)
    place_S = torch.arange(len(sent.choice_S), device=device) + shift_E.repeat_interleave(size_E)
    choice_P, filled_P1 = sent.choice_S.new_zeros(places), torch.zeros(places, 1, device=device)
    choice_P[place_S] = sent.choice_S
    filled_P1[place_S] = 1.0
    ends = torch.cat([place_S, place_S.new_tensor([places])])
    return SlotPlaces(runs, choice_P, ends[sent.slot_NK], filled_P1)
