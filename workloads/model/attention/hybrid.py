"""Exact attention over two blocks and a far part by features under one normaliser (docs/theory A.7).

Dimensions: B batch, T context, H query heads, G key/value heads, E = H / G, N = B * G, S head size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from escala.schema import ModelConfig
from escala.schema.attention.hybrid import window_of
from workloads.model.attention.features import FeatureSums, UnitScale, far_keys
from workloads.model.attention.layout import by_tile, join_heads, of_heads, packing, split_heads
from workloads.model.attention.local import Band, local_attention
from workloads.model.attention.near_and_far import NearAndFarPlan, NearAndFarState
from workloads.model.attention.registry import AttentionModule
from workloads.model.attention.sums import Begun, BlockSums, begun


class NearAndFar(AttentionModule):
    """Exact attention over a query's block and the one before; beyond them `far`, weighed by e^gain.

    Attributes:
        gain_H: g, a scalar a query head, 0 at the start.
        is_far_bypassed: leave the far part out, to see what it is worth.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config, self.block_tokens = config, window_of(config) // 2
        self.unit = UnitScale(config)
        self.gain_H = nn.Parameter(torch.zeros(config.n_heads))
        self.is_far_bypassed = False

    def prepare(self, context_tokens: int, documents_BT: Tensor | None, device: torch.device) -> Band:
        """Which keys a query sees exactly."""
        return Band(packing(context_tokens, documents_BT, device), block_tokens=self.block_tokens)

    @abstractmethod
    def far(
        self, x_NETS: Tensor, y_NTS: Tensor, v_NTS: Tensor, temperature_N: Tensor, band: Band
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(numerator_NETS, denominator_NET, log_scale_N) of the keys two or more blocks before; of a query without
        any, numerator 0 and denominator 1. What is returned is e^-log_scale of the kernel's; None: 0.
        """

    def attend(self, q_BTHS: Tensor, k_BTGS: Tensor, v_BTGS: Tensor, prepared: Band) -> Tensor:
        """See AttentionModule."""
        batch = len(q_BTHS)
        q_NETS, k_NTS, v_NTS = split_heads(q_BTHS, k_BTGS, v_BTGS)
        near_NETS, lse_NET = local_attention(q_NETS, k_NTS, v_NTS, prepared)
        if self.is_far_bypassed:
            return join_heads(near_NETS, batch, q_BTHS.dtype)
        x_NETS, y_NTS, temperature_N = self.unit(q_NETS, k_NTS)
        numerator, denominator, log_scale_N = self.far(x_NETS, y_NTS, v_NTS, temperature_N, prepared)
        log_weight_NE = self.gain_H.to(near_NETS.dtype).view(k_BTGS.shape[2], -1).repeat(batch, 1)
        if log_scale_N is not None:
            log_weight_NE = log_weight_NE + log_scale_N[:, None]
        is_far_NT = of_heads(far_keys(prepared.packing, self.block_tokens) > 0, len(k_NTS))
        out_NETS = one_normaliser(near_NETS, lse_NET, numerator, denominator, log_weight_NE, is_far_NT)
        return join_heads(out_NETS, batch, q_BTHS.dtype)


def one_normaliser(
    near_NETS: Tensor,
    lse_NET: Tensor,
    numerator_NETS: Tensor,
    denominator_NET: Tensor,
    log_weight_NE: Tensor,
    is_far_NT: Tensor,
) -> Tensor:
    """(e^lse near + e^w numerator) / (e^lse + e^w denominator), by the logarithm of the whole normaliser."""
    log_weight_NE1 = log_weight_NE.unsqueeze(-1)
    none_N1T, nothing = ~is_far_NT[:, None], float("-inf")
    log_far = (log_weight_NE1 + denominator_NET.log()).masked_fill(none_N1T, nothing)
    total = torch.logaddexp(lse_NET, log_far)
    near = near_NETS * (lse_NET - total).exp().unsqueeze(-1)
    # Without a far part the weight could overflow.
    far = (log_weight_NE1 - total).masked_fill(none_N1T, nothing).exp()
    return torch.addcmul(near, numerator_NETS, far.unsqueeze(-1))


class Hybrid(NearAndFar):
    """The far part by features."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.sums = FeatureSums(config, self.block_tokens, lag=2)

    def far(
        self, x_NETS: Tensor, y_NTS: Tensor, v_NTS: Tensor, temperature_N: Tensor, band: Band
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See NearAndFar."""
        found: tuple[Tensor, Tensor, Tensor | None] = self.sums(
            x_NETS, y_NTS, v_NTS, temperature_N, band.packing
        )
        return found

    @classmethod
    def decode_state(
        cls, layers: Sequence[Self], blocks: int, block_tokens: int, like: Tensor
    ) -> HybridState:
        """Keys and values of the window's blocks, and a state before each block: constant for a sequence."""
        return HybridState(layers, layers[0]._config, blocks, block_tokens, like)


class HybridState(NearAndFarState):
    """Beside each block the sums of all blocks that lie two or more before it."""

    def __init__(
        self, layers: Sequence[Hybrid], config: ModelConfig, blocks: int, block_tokens: int, like: Tensor
    ) -> None:
        super().__init__(layers, config, window_of(config) // 2, blocks, block_tokens, like)
        self._layers = layers
        width = layers[0].sums.features.count
        self._before = BlockSums(len(layers), blocks, config.kv_heads, width, config.head_size, like)

    def plan_borders(self, tables: Sequence[Sequence[int]], spans: Sequence[range]) -> Begun:
        """The blocks that begin."""
        return begun(tables, spans, self.block_tokens, 2, self.near.keys.device)

    def make_far(self, layer: int, borders: Begun) -> None:
        """See NearAndFarState."""
        core = self._layers[layer]

        def joins() -> tuple[Tensor, Tensor]:
            k_BGCS, v_BGCS = (
                x[layer].index_select(0, borders.joined) for x in (self.near.keys, self.near.values)
            )
            y_GNS = core.unit.scaled(k_BGCS.transpose(0, 1).flatten(1, 2))
            phi_BGCM = by_tile(core.sums.mapped(y_GNS), len(k_BGCS))
            return phi_BGCM.flatten(0, 1), v_BGCS.flatten(0, 1)

        self._before.begin(layer, borders, joins)

    def plan_far(self, tables: Sequence[Sequence[int]], place_T: Tensor, in_place: bool) -> Tensor:
        """(T,), the tiles' blocks."""
        found = [table[place] for table, place in zip(tables, place_T.tolist(), strict=True)]
        return torch.tensor(found).to(self.near.keys.device)

    def far(
        self, layer: int, x_GNS: Tensor, plan: NearAndFarPlan
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See NearAndFarState."""
        core, tiles = self._layers[layer], len(plan.far)
        phi_TGRM = by_tile(core.sums.mapped(x_GNS), tiles)
        sums_NRV = self._before.read(layer, plan.far, phi_TGRM.flatten(0, 1))
        shift_G = core.sums.shift_G(x_GNS)
        return (
            torch.unflatten(sums_NRV, 0, (tiles, -1)),
            core.unit.least_G() if core.sums.features.is_signed else None,
            None if shift_G is None else 2 * shift_G,
        )

    def tile_numbers(self, queries: int, heads: int, blocks: int, of_several: bool) -> int:
        """See DecodeState."""
        width, values = self._before.sums.shape[-2:]
        far = queries * heads * (width + values) + self._before.sums[0, 0].numel()
        return super().tile_numbers(queries, heads, blocks, of_several) + far


make_attention = Hybrid
