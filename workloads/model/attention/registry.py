"""What computes each kind of attention: module `workloads.model.attention.KIND`, found by its kind's name.

What the control plane must know of a kind (options, FLOPs, memory) stands in `escala.schema.attention.KIND`.

Dimensions: B batch, T context, H query heads, G key/value heads, S head size; in generation N tokens, T tiles, Q
queries of a tile, E query heads of each key/value head.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from escala.schema import ModelConfig


class AttentionModule(nn.Module, ABC):
    """What attention computes between projections and output in one layer, with the kind's own parameters."""

    def forward(
        self,
        q_BTHS: Tensor,
        k_BTGS: Tensor,
        v_BTGS: Tensor,
        documents_BT: Tensor | None = None,
        prepared: Any = None,
    ) -> Tensor:
        """Causal output_BTHS.

        Args:
            q_BTHS, k_BTGS: rotated already.
            documents_BT: a number for each token; no token sees one with another number. A document's tokens are
                adjacent. None: all are of one.
            prepared: what `prepare` made of `documents_BT`, which then is not read; None: it is made here.
        """
        if prepared is None:
            prepared = self.prepare(q_BTHS.shape[1], documents_BT, q_BTHS.device)
        return self.attend(q_BTHS, k_BTGS, v_BTGS, prepared)

    @abstractmethod
    def prepare(self, context_tokens: int, documents_BT: Tensor | None, device: torch.device) -> Any:
        """What all layers of one forward pass share (a mask); None where there is nothing."""

    @abstractmethod
    def attend(self, q_BTHS: Tensor, k_BTGS: Tensor, v_BTGS: Tensor, prepared: Any) -> Tensor:
        """See `forward`."""

    @classmethod
    @abstractmethod
    def decode_state(
        cls, layers: Sequence[Self], blocks: int, block_tokens: int, like: Tensor
    ) -> DecodeState:
        """Nothing yet, in `blocks` blocks, for all `layers`, whose parameters it reads whenever it is used; in the
        dtype and on the device of `like`. Raises SpecError for a block_tokens that the kind cannot have.
        """


class DecodeState(Protocol):
    """What generation keeps of running sequences, in blocks of `block_tokens` positions, and reads for new tokens.

    Within a forward pass every layer writes its new positions before any query of the layer is answered. A sequence's
    blocks that are behind the kind's `live_blocks` may be gone: their places in its table hold no block's number.
    """

    block_tokens: int

    def plan_borders(self, tables: Sequence[Sequence[int]], spans: Sequence[range]) -> Any:
        """What is to be made where the new positions of one forward pass begin or fill a block, the same for all
        layers.

        Args:
            tables: of each sequence, its blocks in the order of positions.
            spans: its new positions.
        """
        ...

    def plan(self, tables: Sequence[Sequence[int]], positions_TQ: Tensor) -> Any:
        """How the tiles of one forward pass read the state, the same for all layers.

        Args:
            tables: of each tile, its request's blocks in the order of positions.
            positions_TQ: where its queries stand, int64 on the CPU, ascending along Q; each sees positions up to its
                own.
        """
        ...

    def tile_numbers(self, queries: int, heads: int, blocks: int, of_several: bool) -> int:
        """Numbers that it holds in memory to answer one tile in one layer: they bound the tiles that go together.

        Args:
            queries, heads: of the tile, query heads.
            blocks: of the sequence, up to the tile's last query.
            of_several: the tile belongs to several successive tokens of its sequence.
        """
        ...

    def write(
        self, layer: int, blocks: Tensor, offsets: Tensor, k_NGS: Tensor, v_NGS: Tensor, borders: Any
    ) -> None:
        """Take in N positions, the n-th at offset[n] of block[n]; `borders`: what `plan_borders` made."""
        ...

    def attend(self, q_TQGES: Tensor, layer: int, plan: Any) -> Tensor:
        """output_TQGES in fp32."""
        ...


def make_attention(config: ModelConfig) -> AttentionModule:
    """What computes the attention of one layer: `make_attention` of its kind's module."""
    module = importlib.import_module(f"workloads.model.attention.{config.attention.kind}")
    attention: AttentionModule = module.make_attention(config)
    return attention


def decode_state(
    layers: Sequence[AttentionModule], blocks: int, block_tokens: int, like: Tensor
) -> DecodeState:
    """`AttentionModule.decode_state` of the kind of all `layers`."""
    return type(layers[0]).decode_state(layers, blocks, block_tokens, like)
