"""Causal sums of phi(q) phi(k)^T [v, 1] by blocks: a state of fp32 goes from block to block, and phi is made again in
the backward pass, so that time and memory are linear in T (docs/theory A.4; Katharopoulos et al. 2020).

Dimensions: N batch x key/value heads, E query heads of each, T context, S head size, R rows, M width of phi, C tokens
of a block, V = S + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from workloads.model.attention.layout import Packing, of_heads

Phi = Callable[[Tensor, Tensor], Tensor]
"""phi_NKM of x_NKS and rows_NRS."""


@dataclass(frozen=True)
class _Blocks:
    """The blocks of a context. A state holds tokens of one document alone: that of its last token. So a query reads it
    only where it is of that document, and it starts empty where the next block ends in another one.
    """

    packed: Packing
    size: int
    lag: int
    of_all: int  # N

    @property
    def count(self) -> int:
        return -(-self.packed.context_tokens // self.size)

    def at(self, block: int) -> slice:
        return slice(block * self.size, min((block + 1) * self.size, self.packed.context_tokens))

    def _last_document(self, block: int) -> Tensor | None:
        documents_BT = self.packed.documents_BT
        return None if documents_BT is None else documents_BT[:, self.at(block).stop - 1, None]

    def _same(self, block: int, of: int) -> Tensor | None:
        """(N, C, 1): which tokens of a block are of the document of the state after block `of`; None: all."""
        documents_BT, last_B1 = self.packed.documents_BT, self._last_document(of)
        if documents_BT is None or last_B1 is None:
            return None
        return of_heads(documents_BT[:, self.at(block)] == last_B1, self.of_all).unsqueeze(-1)

    def reads(self, block: int) -> Tensor | None:
        """Which of a block's queries read the state before it."""
        return self._same(block, block - self.lag)

    def joins(self, block: int) -> Tensor | None:
        """Which of a block's keys join the state after it."""
        return self._same(block, block)

    def goes_on(self, block: int) -> Tensor | None:
        """(N, 1, 1): whether the state after `block` holds that before it."""
        last_B1, before_B1 = self._last_document(block), self._last_document(block - 1)
        if last_B1 is None or before_B1 is None:
            return None
        return of_heads(last_B1 == before_B1, self.of_all).unsqueeze(-1)

    def own_CC(self, block: int) -> Tensor:
        """(C, C) or (N, 1, C, C): which keys of its own block a query sees, with lag 1."""
        at = self.at(block)
        documents_BT = self.packed.documents_BT
        tokens = at.stop - at.start
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=self.packed.device).tril()
        if documents_BT is None:
            return seen
        same_BCC = documents_BT[:, at, None] == documents_BT[:, None, at]
        return of_heads(same_BCC & seen, self.of_all).unsqueeze(1)


def prefix_sums(
    x_NETS: Tensor,
    y_NTS: Tensor,
    v_NTS: Tensor,
    rows_NRS: Tensor,
    phi: Phi,
    packed: Packing,
    block_tokens: int,
    lag: int,
) -> Tensor:
    """sums_NETV: of phi(x) . phi(y) [v, 1] over the tokens of all blocks that are `lag` or more before the query's own;
    with lag 1 also over those of its own up to itself.
    """
    blocks = _Blocks(packed, block_tokens, lag, len(y_NTS))
    sums: Tensor = _prefix(x_NETS, y_NTS, v_NTS, rows_NRS, phi, blocks)
    return sums


class _Prefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, v: Tensor, rows: Tensor, phi: Phi, blocks: _Blocks) -> Tensor:
        lag, width = blocks.lag, v.shape[-1] + 1
        sums = x.new_zeros(*x.shape[:3], width)
        states: list[Tensor] = []  # after each block that a later one reads
        for block in range(blocks.count):
            at = blocks.at(block)
            is_read, own = block + lag < blocks.count, lag == 1
            key = phi(y[:, at], rows) if is_read or own else None
            values = _with_one(v[:, at], x.dtype)
            if block >= lag or own:
                query = phi(x[:, :, at].flatten(1, 2), rows)
                found = sums[:, :, at]
                if block >= lag:
                    part = torch.bmm(query, states[block - lag]).view(found.shape)
                    found.add_(_masked(part, blocks.reads(block), 1))
                if own and key is not None:
                    found.add_(torch.bmm(_own_scores(query, key, blocks, block), values).view(found.shape))
            if is_read and key is not None:
                state = torch.bmm(key.transpose(1, 2), _masked(values, blocks.joins(block)))
                states.append(state if block == 0 else state.add_(_masked(states[-1], blocks.goes_on(block))))
        ctx.save_for_backward(x, y, v, rows, *states)
        ctx.phi, ctx.blocks = phi, blocks
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, v, rows, *states = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        lag, needs_rows = blocks.lag, ctx.needs_input_grad[3]
        grads = [torch.zeros_like(each) for each in (x, y, v, rows)]
        by_state: dict[int, Tensor] = {}  # of the state after a block, from its one reader
        carried: Tensor | None = None  # of the state after the block, from all readers
        for block in reversed(range(blocks.count)):
            at, own = blocks.at(block), lag == 1
            if block + lag < blocks.count:
                found = by_state.pop(block)
                carried = found if carried is None else found + _masked(carried, blocks.goes_on(block + 1))
            leaf_x, leaf_y, leaf_rows = (
                each.detach().requires_grad_(needed)
                for each, needed in ((x[:, :, at].flatten(1, 2), True), (y[:, at], True), (rows, needs_rows))
            )
            values = _with_one(v[:, at], x.dtype)
            sums = grad[:, :, at].flatten(1, 2)
            outputs, output_grads = [], []
            if block >= lag or own:
                with torch.enable_grad():
                    query = ctx.phi(leaf_x, leaf_rows)
                by_query = torch.zeros_like(query)
                if block >= lag:
                    read = _masked(grad[:, :, at], blocks.reads(block), 1).flatten(1, 2)
                    by_query.baddbmm_(read, states[block - lag].transpose(1, 2))
                    by_state[block - lag] = torch.bmm(query.detach().transpose(1, 2), read)
                outputs, output_grads = [query], [by_query]
            if carried is not None or own:
                with torch.enable_grad():
                    key = ctx.phi(leaf_y, leaf_rows)
                by_key, by_values = torch.zeros_like(key), torch.zeros_like(values)
                if carried is not None:
                    joins = blocks.joins(block)
                    by_key.baddbmm_(_masked(values, joins), carried.transpose(1, 2))
                    by_values.add_(_masked(torch.bmm(key.detach(), carried), joins))
                if own:
                    scores = _own_scores(query.detach(), key.detach(), blocks, block)
                    by_values.baddbmm_(scores.transpose(1, 2), sums)
                    by_scores = torch.bmm(sums, values.transpose(1, 2))
                    by_scores = _seen(by_scores, blocks, block)
                    by_query.baddbmm_(by_scores, key.detach())
                    by_key.baddbmm_(by_scores.transpose(1, 2), query.detach())
                grads[2][:, at] = by_values[..., :-1]
                outputs, output_grads = [*outputs, key], [*output_grads, by_key]
            if outputs:
                _through_phi(outputs, output_grads, (leaf_x, leaf_y, leaf_rows), grads, at)
        return *(g.to(t.dtype) for g, t in zip(grads, (x, y, v, rows), strict=True)), None, None


def _through_phi(
    outputs: list[Tensor],
    output_grads: list[Tensor],
    leaves: tuple[Tensor, Tensor, Tensor],
    grads: list[Tensor],
    at: slice,
) -> None:
    """Add the gradients of a block's queries, keys and rows."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, output_grads, allow_unused=True))
    by_x, by_y = next(found), next(found)
    if by_x is not None:
        grads[0][:, :, at] = by_x.view(grads[0][:, :, at].shape)
    if by_y is not None:
        grads[1][:, at] = by_y
    for by_rows in found:
        if by_rows is not None:
            grads[3] += by_rows


def _with_one(v_NCS: Tensor, dtype: torch.dtype) -> Tensor:
    """[v, 1]."""
    return F.pad(v_NCS.to(dtype), (0, 1), value=1.0)


def _own_scores(query: Tensor, key: Tensor, blocks: _Blocks, block: int) -> Tensor:
    """(N, E * C, C), 0 where a query does not see a key of its own block."""
    return _seen(torch.bmm(query, key.transpose(1, 2)), blocks, block)


def _seen(scores: Tensor, blocks: _Blocks, block: int) -> Tensor:
    tokens = scores.shape[-1]
    cut = scores.view(len(scores), -1, tokens, tokens).mul_(blocks.own_CC(block))
    return cut.view(scores.shape)


def _masked(x: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """x where the mask is true, else 0; the mask lacks dimension `dim` of x."""
    if mask is None:
        return x
    return x * (mask if dim is None else mask.unsqueeze(dim))


_prefix: Callable[..., Any] = _Prefix.apply
