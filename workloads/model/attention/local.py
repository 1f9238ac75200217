"""Attention to the keys near by, block after block: time and memory linear in T, scores made again in the backward
pass (Dao et al. 2022, algorithm 4), with the log-sum-exp that a far part needs to share its normaliser.

Dimensions: N batch x key/value heads, E query heads of each, T context, S head size; C queries and K keys of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from workloads.model.attention.flex import flex_fits, flex_local, flex_mask
from workloads.model.attention.layout import Packing, accumulated, of_heads

STEP_TOKENS = 128
"""Queries of a step: at 64 the products are small, at 256 a window of 512 meets too many keys."""


@dataclass(frozen=True)
class Band:
    """Which keys a query sees: the last `window_tokens`; or, with `block_tokens`, its block's and the one before's."""

    packing: Packing
    window_tokens: int | None = None
    block_tokens: int | None = None

    def steps(self) -> Iterator[tuple[slice, slice]]:
        """(queries, keys) of each step; no step crosses a block's border."""
        context, block = self.packing.context_tokens, self.block_tokens
        size = STEP_TOKENS if block is None else min(STEP_TOKENS, block)
        start = 0
        while start < context:
            end = min(start + size, context)
            if block is not None:
                end = min(end, start - start % block + block)
            yield slice(start, end), slice(self._first_key(start), end)
            start = end

    def _first_key(self, query: int) -> int:
        if self.block_tokens is not None:
            return max(0, (query // self.block_tokens - 1) * self.block_tokens)
        return max(0, query - (self.window_tokens or query + 1) + 1)

    @functools.cached_property
    def flex_mask(self) -> BlockMask:
        """The band as flex_attention reads it."""
        return flex_mask(self.packing, self.window_tokens, self.block_tokens)

    def unseen(self, queries: slice, keys: slice, count: int) -> Tensor:
        """True where a query (row) does not see a key (column), (C, K) or (N, 1, C, K), N = `count`."""
        unseen_CK = _beyond(
            queries.start - keys.start,
            queries.stop - queries.start,
            keys.stop - keys.start,
            self.window_tokens,
            self.packing.device,
        )
        documents_BT = self.packing.documents_BT
        if documents_BT is None:
            return unseen_CK
        other_BCK = documents_BT[:, queries, None] != documents_BT[:, None, keys]
        return of_heads(other_BCK | unseen_CK, count).unsqueeze(1)


@functools.lru_cache(64)
def _beyond(offset: int, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys): the key is later, or `window` or more tokens earlier. `offset`: first query less first key."""
    with torch.inference_mode(False):
        distance = torch.arange(queries, device=device)[:, None] + offset - torch.arange(keys, device=device)
        unseen = distance < 0
        return unseen if window is None else unseen | (distance >= window)


def local_attention(q_NETS: Tensor, k_NTS: Tensor, v_NTS: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """(out_NETS, lse_NET) in fp32 (fp64 for fp64): softmax(q k^T / sqrt(S)) v over the band, and log sum e^(q k).

    On CUDA by flex_attention where it fits (see `flex`), else step by step.
    """
    if flex_fits(q_NETS):
        documents_BT = band.packing.documents_BT
        batch = (
            len(k_NTS) if documents_BT is None else len(documents_BT)
        )  # without documents any split will do
        return flex_local(q_NETS, k_NTS, v_NTS, band.flex_mask, batch)
    return stepwise(q_NETS, k_NTS, v_NTS, band)


def stepwise(q_NETS: Tensor, k_NTS: Tensor, v_NTS: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """`local_attention` in steps of a few queries, in torch's own products."""
    found: tuple[Tensor, Tensor] = _local(q_NETS, k_NTS, v_NTS, band)
    return found


class _NearbyKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Band) -> tuple[Tensor, Tensor]:
        kind = accumulated(q.dtype)
        out, lse = torch.empty_like(q, dtype=kind), q.new_empty(q.shape[:3], dtype=kind)
        for queries, keys in band.steps():
            weights = scores(q, k, queries, keys)
            weights.masked_fill_(band.unseen(queries, keys, len(k)), float("-inf"))
            top = weights.amax(-1, keepdim=True)
            weights.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            values = torch.bmm(weights.flatten(1, 2), v[:, keys].to(kind))
            torch.div(values.view(*total.shape[:3], -1), total, out=out[:, :, queries])
            lse[:, :, queries] = (top + total.log()).squeeze(-1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.band = band
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        kind, scale, band = out.dtype, q.shape[-1] ** -0.5, ctx.band
        grad_q = torch.empty_like(q, dtype=kind)
        grad_k, grad_v = torch.zeros_like(k, dtype=kind), torch.zeros_like(v, dtype=kind)
        delta = torch.linalg.vecdot(grad_out, out).sub_(grad_lse).unsqueeze(-1)
        for queries, keys in band.steps():
            grad = grad_out[:, :, queries].flatten(1, 2)
            weights = scores(q, k, queries, keys).sub_(lse[:, :, queries, None]).exp_()
            weights.masked_fill_(band.unseen(queries, keys, len(k)), 0.0)
            weights = weights.flatten(1, 2)
            grad_v[:, keys].baddbmm_(weights.transpose(1, 2), grad)
            by_score = torch.bmm(grad, v[:, keys].to(kind).transpose(1, 2))
            by_score.sub_(delta[:, :, queries].flatten(1, 2)).mul_(weights).mul_(scale)
            found = torch.bmm(by_score, k[:, keys].to(kind))
            grad_q[:, :, queries] = found.view(*grad_q[:, :, queries].shape)
            grad_k[:, keys].baddbmm_(by_score.transpose(1, 2), q[:, :, queries].to(kind).flatten(1, 2))
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None


def scores(q: Tensor, k: Tensor, queries: slice, keys: slice) -> Tensor:
    """(N, E, C, K): q k^T / sqrt(S) of a step, in fp32 (fp64 for fp64)."""
    kind = accumulated(q.dtype)
    rows = q[:, :, queries]
    scaled = rows.to(kind).flatten(1, 2) * q.shape[-1] ** -0.5
    return torch.bmm(scaled, k[:, keys].to(kind).transpose(1, 2)).view(*rows.shape[:3], -1)


_local: Callable[..., Any] = _NearbyKeys.apply
