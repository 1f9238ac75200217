"""Exact attention over two blocks, landmarks of each past block beyond, one normaliser (docs/theory A.5, A.7).

Of each block c the tokens with the largest ridge leverage scores are its landmarks L_c (Musco & Musco 2017, eq. 2); its
keys are summed as M_c = (kappa(L_c, L_c) + ridge I)^-1 sum_j kappa(L_c, y_j) [v_j, 1], kappa(a, b) = e^(a.b).

Dimensions: B batch, T context, G key/value heads, E query heads of each, N = B * G, S head size, C tokens of a block, P
landmarks of a block, V = S + 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from escala.schema import ModelConfig
from escala.schema.attention.hybrid import window_of
from escala.schema.attention.nystrom import NystromAttention
from workloads.model.attention.features import at_least, far_keys
from workloads.model.attention.hybrid import NearAndFar
from workloads.model.attention.layout import Packing, accumulated, by_tile, of_heads
from workloads.model.attention.local import Band
from workloads.model.attention.near_and_far import NearAndFarPlan, NearAndFarState
from workloads.model.attention.paged import Pairs, pair_up

LEAST_RIDGE = 1e-3  # of the scores: with 0 all tokens score 1


class Nystrom(NearAndFar):
    """The far part by landmarks: every query meets those of every past block, T^2 landmarks / S in all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        section = config.attention
        if not isinstance(section, NystromAttention):
            raise TypeError(f"attention {section.kind} has no landmarks")
        self.landmarks, self.ridge = section.landmarks, section.ridge

    def far(
        self, x_NETS: Tensor, y_NTS: Tensor, v_NTS: Tensor, temperature_N: Tensor, band: Band
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See NearAndFar."""
        packed, size = band.packing, self.block_tokens
        nothing = x_NETS[:, :, : 2 * size, :1] * 0  # its gradient is 0, not none: ZeRO-3 waits for one
        found = [nothing.expand(*nothing.shape[:3], v_NTS.shape[-1] + 1)]
        past = -(-packed.context_tokens // size) - 2  # blocks that are far of some query
        if past > 0:
            found += self._read(x_NETS, *self._summaries(y_NTS, v_NTS, packed, past), packed, past)
        total = torch.cat(found, 2)
        count_NT = of_heads(far_keys(packed, size), len(y_NTS))
        denominator = at_least(total[..., -1], count_NT, temperature_N)
        return total[..., :-1], denominator.masked_fill(count_NT[:, None] == 0, 1.0), None

    def _summaries(self, y_NTS: Tensor, v_NTS: Tensor, packed: Packing, past: int) -> tuple[Tensor, Tensor]:
        """(landmarks_NLPS, sums_NLPV) of the first L = `past` blocks; of a block's tokens those count that are of its
        last one's document, which alone goes on.
        """
        size, tokens = self.block_tokens, past * self.block_tokens
        joins_MC = None
        if packed.documents_BT is not None:
            blocks_BLC = torch.unflatten(packed.documents_BT[:, :tokens], 1, (past, size))
            joins_BLC = blocks_BLC == blocks_BLC[:, :, -1:]
            joins_MC = of_heads(joins_BLC, len(y_NTS)).flatten(0, 1)
        y_MCS, v_MCS = (torch.unflatten(x[:, :tokens], 1, (past, size)).flatten(0, 1) for x in (y_NTS, v_NTS))
        made = checkpoint(summary, y_MCS, v_MCS, self.landmarks, self.ridge, joins_MC, use_reentrant=False)
        landmarks_NLPS, sums_NLPV = (torch.unflatten(x.contiguous(), 0, (-1, past)) for x in made)
        return landmarks_NLPS, sums_NLPV

    def _read(
        self, x_NETS: Tensor, landmarks_NLPS: Tensor, sums_NLPV: Tensor, packed: Packing, past: int
    ) -> Iterator[Tensor]:
        """Of each block that has a far part, the sums over the landmarks of the blocks that are past."""
        size = self.block_tokens
        for blocks in range(1, past + 1):
            queries = slice((blocks + 1) * size, min((blocks + 2) * size, packed.context_tokens))
            reads = None
            if packed.documents_BT is not None:
                last_BL = packed.documents_BT[:, size - 1 : blocks * size : size]
                same_BCL = packed.documents_BT[:, queries, None] == last_BL[:, None]
                reads = of_heads(same_BCL.repeat_interleave(self.landmarks, 2), len(x_NETS))
            near, sums = landmarks_NLPS[:, :blocks].flatten(1, 2), sums_NLPV[:, :blocks].flatten(1, 2)
            yield checkpoint(read_landmarks, x_NETS[:, :, queries], near, sums, reads, use_reentrant=False)

    @classmethod
    def decode_state(
        cls, layers: Sequence[Self], blocks: int, block_tokens: int, like: Tensor
    ) -> NystromState:
        """Keys and values, and the landmarks of each block."""
        return NystromState(layers, layers[0]._config, blocks, block_tokens, like)


class NystromState(NearAndFarState):
    """Beside each block its landmarks and their sums, made when its last position is written."""

    def __init__(
        self, layers: Sequence[Nystrom], config: ModelConfig, blocks: int, block_tokens: int, like: Tensor
    ) -> None:
        super().__init__(layers, config, window_of(config) // 2, blocks, block_tokens, like)
        self._layers = layers
        shape = (len(layers), blocks, config.kv_heads, layers[0].landmarks)
        make = functools.partial(torch.zeros, dtype=accumulated(like.dtype), device=like.device)
        self._landmarks, self._sums = make(*shape, config.head_size), make(*shape, config.head_size + 1)

    def plan_borders(self, tables: Sequence[Sequence[int]], spans: Sequence[range]) -> Tensor:
        """(B,), the blocks that are filled."""
        size = self.block_tokens
        found = [
            table[place]
            for table, span in zip(tables, spans, strict=True)
            for place in range(span.start // size, span.stop // size)
        ]
        return torch.tensor(found, dtype=torch.int64).to(self.near.keys.device)

    def make_far(self, layer: int, borders: Tensor) -> None:
        """See NearAndFarState."""
        if not len(borders):
            return
        core = self._layers[layer]
        k_BGCS, v_BGCS = (x[layer].index_select(0, borders) for x in (self.near.keys, self.near.values))
        y_GNS = core.unit.scaled(k_BGCS.transpose(0, 1).flatten(1, 2))
        y_NCS = by_tile(y_GNS, len(borders)).flatten(0, 1)
        landmarks_NPS, sums_NPV = summary(y_NCS, v_BGCS.flatten(0, 1), core.landmarks, core.ridge)
        self._landmarks[layer, borders] = torch.unflatten(landmarks_NPS, 0, (len(borders), -1))
        self._sums[layer, borders] = torch.unflatten(sums_NPV, 0, (len(borders), -1))

    def plan_far(self, tables: Sequence[Sequence[int]], place_T: Tensor, in_place: bool) -> Pairs:
        """The tiles' far blocks."""
        last_T = (place_T - 2).clamp(min=-1)
        pairs = pair_up(tables, torch.zeros_like(last_T), last_T, in_place, 1)
        return pairs.to(self.near.keys.device)

    def far(
        self, layer: int, x_GNS: Tensor, plan: NearAndFarPlan
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See NearAndFarState."""
        pairs, (heads, tiles) = plan.far, (len(x_GNS), len(plan.count_T1111))
        parts = pairs.parts(by_tile(x_GNS, tiles), self._landmarks[layer], self._sums[layer])
        products = [torch.bmm(torch.bmm(x, y.transpose(1, 2)).exp(), m) for x, y, m in parts]
        return pairs.sum(products, tiles, heads), self._layers[layer].unit.least_G(), None

    def tile_numbers(self, queries: int, heads: int, blocks: int, of_several: bool) -> int:
        """See DecodeState."""
        _, _, kv_heads, landmarks, values = self._sums.shape
        copied = 2 * kv_heads * landmarks * values if of_several else 0
        far = blocks * (queries * heads * (landmarks + values) + copied)
        return super().tile_numbers(queries, heads, blocks, of_several) + far


def summary(
    y_NCS: Tensor, v_NCS: Tensor, landmarks: int, ridge: float, joins_NC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(landmarks_NPS, sums_NPV) of a block: L_c and M_c; `joins_NC`: the tokens that count, None: all.

    A landmark that does not count, where a block has fewer tokens that do, has the sum 0.
    """
    kernel_NCC = torch.bmm(y_NCS, y_NCS.transpose(1, 2)).exp()
    index_NP = chosen(kernel_NCC.detach(), landmarks, ridge, joins_NC)
    rows_NPC = kernel_NCC.take_along_dim(index_NP.unsqueeze(-1), 1)
    values_NCV = torch.nn.functional.pad(v_NCS.to(y_NCS.dtype), (0, 1), value=1.0)
    inner_NPP = rows_NPC.take_along_dim(index_NP.unsqueeze(1), 2)
    eye = torch.eye(landmarks, dtype=y_NCS.dtype, device=y_NCS.device)
    if joins_NC is not None:
        counts_NP = joins_NC.take_along_dim(index_NP, 1)
        rows_NPC = rows_NPC * joins_NC.unsqueeze(1) * counts_NP.unsqueeze(-1)
        inner_NPP = inner_NPP * counts_NP.unsqueeze(1) * counts_NP.unsqueeze(2)
        inner_NPP = inner_NPP + eye * ~counts_NP.unsqueeze(-1)
    factor = torch.linalg.cholesky(inner_NPP + ridge * eye)
    sums_NPV = torch.cholesky_solve(torch.bmm(rows_NPC, values_NCV), factor)
    return y_NCS.take_along_dim(index_NP.unsqueeze(-1), 1), sums_NPV


def chosen(kernel_NCC: Tensor, landmarks: int, ridge: float, joins_NC: Tensor | None) -> Tensor:
    """(N, P): the tokens with the largest ridge leverage scores, [K (K + ridge I)^-1]_jj, of those that count."""
    tokens = kernel_NCC.shape[-1]
    if landmarks == tokens:
        return torch.arange(tokens, device=kernel_NCC.device).expand(len(kernel_NCC), -1)
    eye = torch.eye(tokens, dtype=kernel_NCC.dtype, device=kernel_NCC.device)
    if joins_NC is not None:
        kernel_NCC = kernel_NCC * joins_NC.unsqueeze(1) * joins_NC.unsqueeze(2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel_NCC + max(ridge, LEAST_RIDGE) * eye))
    rest_NC = inverse.diagonal(dim1=1, dim2=2)  # (1 - score) / ridge
    if joins_NC is not None:
        rest_NC = rest_NC.masked_fill(~joins_NC, float("inf"))
    return rest_NC.topk(landmarks, largest=False).indices


def read_landmarks(x_NECS: Tensor, landmarks_NPS: Tensor, sums_NPV: Tensor, reads: Tensor | None) -> Tensor:
    """(N, E, C, V): kappa(x, L) M over all landmarks, or over those that a query `reads` (N, C, P)."""
    weights = torch.bmm(x_NECS.flatten(1, 2), landmarks_NPS.transpose(1, 2)).exp()
    weights = weights.view(*x_NECS.shape[:3], -1)
    if reads is not None:
        weights = weights * reads.unsqueeze(1)
    found = torch.bmm(weights.flatten(1, 2), sums_NPV)
    return found.view(*x_NECS.shape[:3], -1)


make_attention = Nystrom
