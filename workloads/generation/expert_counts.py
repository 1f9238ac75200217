"""What each running sequence's choices have taken of its experts' places (docs/theory B.5).

The places of a sequence are its own, whatever runs beside it: a piece of a prompt goes on from the counts that the one
before left, and a sequence that is computed again begins at none.

Dimensions: N rows, L mixture layers, R running sequences, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from escala.schema import ModelConfig, MoEConfig
from workloads.model.sequence_capacity import bounds, keep, keep_next

Keep = Callable[[Tensor], Tensor]
"""Of a step's choices experts_NK, which find a place: kept_NK."""


class ExpertCounts:
    """Counts of all running sequences.

    Args:
        moe: `config.moe`.
        factor: of the capacity.
        running: sequences at most, R.
        like: a tensor on the device.
    """

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, factor: float, running: int, like: Tensor
    ) -> None:
        layers = [layer for layer in range(config.n_layers) if config.has_experts(layer)]
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._moe, self._factor = moe, factor
        self._taken_LRE = torch.zeros(len(layers), running, moe.experts, dtype=torch.long, device=like.device)

    def follow(
        self, lengths: Sequence[int], fresh: Sequence[int], positions_N: Tensor, slots_N: Tensor
    ) -> CountedRows:
        """A step's rows: of each piece, one after another, its tokens. Pieces are of different sequences.

        Args:
            lengths: tokens of each piece.
            fresh: the slots of those that begin at position 0.
            positions_N, slots_N: of each row its position, and its sequence's slot: its place among the R.
        """
        bound_N = bounds(positions_N, self._factor, self._moe.chosen, self._moe.experts)
        if fresh:
            self._taken_LRE[:, list(fresh)] = 0
        return CountedRows(self._taken_LRE, self._index, tuple(_parts(lengths)), bound_N, slots_N)


@dataclass(frozen=True)
class CountedRows:
    """The rows of one step, in parts that are counted together; `keep` is called once for each mixture layer."""

    taken_LRE: Tensor
    index: dict[int, int]
    parts: tuple[_Part, ...]
    bound_N: Tensor
    slots_N: Tensor

    def of(self, layer: int) -> Keep:
        """`keep` in this layer of the model."""
        return partial(self.keep, layer)

    def keep(self, layer: int, experts_NK: Tensor) -> Tensor:
        """Which choices find a place, kept_NK; they are counted from here on."""
        taken_RE = self.taken_LRE[self.index[layer]]
        kept = [
            self._keep_piece(taken_RE, experts_NK, part.rows)
            if part.is_piece
            else self._keep_singles(taken_RE, experts_NK, part.rows)
            for part in self.parts
        ]
        return kept[0] if len(kept) == 1 else torch.cat(kept)

    def _keep_singles(self, taken_RE: Tensor, experts_NK: Tensor, rows: slice) -> Tensor:
        slots = self.slots_N[rows]
        kept_NK, after_NE = keep_next(experts_NK[rows], self.bound_N[rows], taken_RE[slots])
        taken_RE[slots] = after_NE
        return kept_NK

    def _keep_piece(self, taken_RE: Tensor, experts_NK: Tensor, rows: slice) -> Tensor:
        slot = self.slots_N[rows][:1]
        kept_1TK, after_1E = keep(experts_NK[rows][None], self.bound_N[rows][None], taken_RE[slot])
        taken_RE[slot] = after_1E
        return kept_1TK[0]


@dataclass(frozen=True)
class _Part:
    """Successive rows: a piece of several tokens, or pieces of one token each."""

    rows: slice
    is_piece: bool


def _parts(lengths: Sequence[int]) -> Iterator[_Part]:
    start = stop = 0
    for length in lengths:
        if length > 1:
            if stop > start:
                yield _Part(slice(start, stop), False)
            start = stop + length
            yield _Part(slice(stop, start), True)
        stop += length
    if stop > start:
        yield _Part(slice(start, stop), False)
