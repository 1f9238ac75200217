"""Exact attention over two blocks and a far part by features under one normaliser (docs/theory A.7).

Dimensions: B batch, T context, H query heads, G key/value heads, E = H / G, N = B * G, S head size.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from escala.schema import ModelConfig
from escala.schema.attention.hybrid import window_of
from workloads.model.attention.features import FeatureSums, UnitScale, far_keys
from workloads.model.attention.layout import join_heads, packing, split_heads
from workloads.model.attention.local import Band, local_attention
from workloads.model.attention.registry import AttentionModule, DecodeState


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
        batch, context = q_BTHS.shape[:2]
        q_NETS, k_NTS, v_NTS = split_heads(q_BTHS, k_BTGS, v_BTGS)
        near_NETS, lse_NET = local_attention(q_NETS, k_NTS, v_NTS, prepared)
        if self.is_far_bypassed or context <= 2 * self.block_tokens:
            unused = (
                sum(weight.sum() for weight in self.parameters()) * 0
            )  # a gradient of 0, not none: ZeRO waits
            return join_heads(near_NETS + unused, batch, q_BTHS.dtype)
        x_NETS, y_NTS, temperature_N = self.unit(q_NETS, k_NTS)
        numerator, denominator, log_scale_N = self.far(x_NETS, y_NTS, v_NTS, temperature_N, prepared)
        log_weight_NE = self.gain_H.to(near_NETS.dtype).view(k_BTGS.shape[2], -1).repeat(batch, 1)
        if log_scale_N is not None:
            log_weight_NE = log_weight_NE + log_scale_N[:, None]
        count_BT = far_keys(prepared.packing, self.block_tokens)
        is_far_NT = prepared.packing.of_heads(count_BT.expand(batch, -1) > 0, k_BTGS.shape[2])
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
    log_far = (log_weight_NE1 + denominator_NET.log()).masked_fill(~is_far_NT[:, None], float("-inf"))
    total = torch.logaddexp(lse_NET, log_far)
    near = near_NETS * (lse_NET - total).exp().unsqueeze(-1)
    return torch.addcmul(near, numerator_NETS, (log_weight_NE1 - total).exp().unsqueeze(-1))


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

    def decode_state(self, blocks: int, block_tokens: int, like: Tensor) -> DecodeState:
        """Keys and values of the window's blocks, and a constant state."""
        raise NotImplementedError


make_attention = Hybrid
