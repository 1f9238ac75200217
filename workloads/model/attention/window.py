"""Exact causal attention over a window of the last keys (docs/theory A.6), linear in T.

On CUDA flash-attn's window where it is installed and fits, else flex_attention (see `local`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from workloads.model.attention.exact import Exact, flash_attention, flash_fits
from workloads.model.attention.layout import join_heads, packing, split_heads
from workloads.model.attention.local import Band, local_attention


class Window(Exact):
    """softmax(q k^T / sqrt(S)) v over the last `window_tokens` keys; generation as exact, over the window's blocks."""

    def prepare(self, context_tokens: int, documents_BT: Tensor | None, device: torch.device) -> Band:
        """Which keys a query sees."""
        return Band(packing(context_tokens, documents_BT, device), self._config.window_tokens)

    def attend(self, q_BTHS: Tensor, k_BTGS: Tensor, v_BTGS: Tensor, prepared: Band) -> Tensor:
        """See AttentionModule."""
        if prepared.packing.documents_BT is None:
            if prepared.window_tokens is None or prepared.window_tokens >= q_BTHS.shape[1]:
                return super().attend(q_BTHS, k_BTGS, v_BTGS, None)
            if flash_fits(q_BTHS):
                return flash_attention(q_BTHS, k_BTGS, v_BTGS, prepared.window_tokens)
        out_NETS, _ = local_attention(*split_heads(q_BTHS, k_BTGS, v_BTGS), prepared)
        return join_heads(out_NETS, len(q_BTHS), q_BTHS.dtype)


make_attention = Window
