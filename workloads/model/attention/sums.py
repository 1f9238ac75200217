"""Running sums of blocks in generation: beside each block of a sequence the state before it, sum phi(k) [v, 1]^T.

A block's state is that of the block before and the product of one past block, made once, when the block's first
position is written. It is a snapshot: what a sequence needs to go on from the block, shared or computed again.

Dimensions: B blocks, N blocks x key/value heads, T tiles, R queries of a tile, G key/value heads, C tokens of a block,
M width of phi, V = S + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.model.attention.layout import accumulated


@dataclass(frozen=True)
class Begun:
    """The blocks whose first position is written in a forward pass, in an order in which each may be made.

    Attributes:
        empty: blocks before which there is nothing to sum.
        block, before, joined: (B,) blocks, those before them, and those whose keys join the state.
        waves: parts of B; what a wave needs is made in those before.
    """

    empty: Tensor
    block: Tensor
    before: Tensor
    joined: Tensor
    waves: list[slice]


def begun(
    tables: Sequence[Sequence[int]],
    spans: Sequence[range],
    block_tokens: int,
    lag: int,
    device: torch.device,
) -> Begun:
    """Of the new positions `spans` of sequences whose blocks are `tables`. The state before a block is over those that
    are `lag` or more before it.
    """
    first = [-(-span.start // block_tokens) for span in spans]
    last = [(span.stop - 1) // block_tokens for span in spans]
    found = sorted(
        (place, table[place], table[place - 1], table[place - lag])
        if place >= lag
        else (-1, table[place], 0, 0)
        for table, a, z in zip(tables, first, last, strict=True)
        for place in range(a, z + 1)
    )
    empty = sum(place < 0 for place, *_ in found)
    places = [place for place, *_ in found[empty:]]
    ends = [i for i in range(1, len(places) + 1) if i == len(places) or places[i] != places[i - 1]]
    waves = [slice(a, z) for a, z in zip([0, *ends], ends, strict=False)]
    blocks = torch.tensor([each[1:] for each in found], dtype=torch.int64).view(-1, 3).to(device)
    block, before, joined = blocks[empty:].unbind(1)
    return Begun(blocks[:empty, 0], block, before, joined, waves)


class BlockSums:
    """The states of `blocks` blocks for every layer, (layers, blocks, G, M, V), in fp32 (fp64 for fp64)."""

    def __init__(
        self, layers: int, blocks: int, heads: int, width: int, head_size: int, like: Tensor
    ) -> None:
        shape = (layers, blocks, heads, width, head_size + 1)
        self.sums = torch.zeros(shape, dtype=accumulated(like.dtype), device=like.device)

    def begin(self, layer: int, begun: Begun, joins: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Make the states of the blocks that begin; `joins` gives phi(k)_NCM and v_NCS of the blocks that join them,
        N = B * G.
        """
        sums = self.sums[layer]
        if len(begun.empty):
            sums[begun.empty] = 0
        if not begun.waves:
            return
        phi_NCM, v_NCS = joins()
        joined_NMV = torch.bmm(phi_NCM.transpose(1, 2), F.pad(v_NCS.to(phi_NCM.dtype), (0, 1), value=1.0))
        joined_BGMV = joined_NMV.view(-1, *sums.shape[1:])
        for wave in begun.waves:
            sums[begun.block[wave]] = sums[begun.before[wave]] + joined_BGMV[wave]

    def read(self, layer: int, block_T: Tensor, phi_NRM: Tensor) -> Tensor:
        """phi(q) . state, (N, R, V), N = T * G: of each tile with the state before its block."""
        return torch.bmm(phi_NRM, blocks_of(self.sums[layer], block_T))


def blocks_of(kept: Tensor, block_T: Tensor) -> Tensor:
    """Of what is kept, (blocks, G, ...), some blocks, (T * G, ...); one alone is read in place, on the CPU."""
    if len(block_T) == 1 and kept.device.type == "cpu":
        return kept[int(block_T)]
    return kept.index_select(0, block_T).flatten(0, 1)
