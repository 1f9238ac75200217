"""How the block-wise kinds cut a context: heads side by side, blocks of tokens, documents as runs of tokens.

Dimensions: B batch, T context, H query heads, G key/value heads, E = H / G, N = B * G, S head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """A context, and its documents.

    Attributes:
        context_tokens: T.
        documents_BT: a number for each token, the same for adjacent tokens of one document; None: all are of one.
    """

    context_tokens: int
    documents_BT: Tensor | None
    device: torch.device

    @cached_property
    def seen_before_BT(self) -> Tensor:
        """Tokens of its document before each token, (B, T), or (1, T)."""
        position = torch.arange(self.context_tokens, device=self.device)
        if self.documents_BT is None:
            return position[None]
        is_start = torch.ones_like(self.documents_BT, dtype=torch.bool)
        is_start[:, 1:] = self.documents_BT[:, 1:] != self.documents_BT[:, :-1]
        return position - (position * is_start).cummax(1).values


def of_heads(x_B: Tensor, count: int) -> Tensor:
    """(B, ...), or (1, ...), as (N, ...), N = `count`: the same for all key/value heads of a row."""
    return x_B.repeat_interleave(count // len(x_B), dim=0)


def packing(context_tokens: int, documents_BT: Tensor | None, device: torch.device) -> Packing:
    """The packing of a batch. Raises ValueError, on the CPU, where a document's number comes back after another's."""
    if documents_BT is not None and documents_BT.device.type == "cpu":
        starts = 1 + (documents_BT[:, 1:] != documents_BT[:, :-1]).sum(1)
        for row, runs in zip(documents_BT, starts.tolist(), strict=True):
            if runs > 1 and len(row.unique()) < runs:
                raise ValueError("documents_BT: the tokens of a document must be adjacent")
    return Packing(context_tokens, documents_BT, device)


def split_heads(q_BTHS: Tensor, k_BTGS: Tensor, v_BTGS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q_NETS, k_NTS, v_NTS), contiguous: each key/value head with its E query heads."""
    heads = k_BTGS.shape[2]
    q_NETS = torch.unflatten(q_BTHS, 2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k_NTS, v_NTS = (x.transpose(1, 2).flatten(0, 1) for x in (k_BTGS, v_BTGS))
    return q_NETS.contiguous(), k_NTS.contiguous(), v_NTS.contiguous()


def join_heads(out_NETS: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """out_BTHS."""
    out_BGETS = torch.unflatten(out_NETS, 0, (batch, -1))
    return out_BGETS.permute(0, 3, 1, 2, 4).flatten(2, 3).to(dtype)


def by_tile(x_GNS: Tensor, tiles: int) -> Tensor:
    """In generation, (T, G, R, S) of (G, T * R, S): R queries of each of T tiles."""
    return torch.unflatten(x_GNS, 1, (tiles, -1)).transpose(0, 1)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: fp32; fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
