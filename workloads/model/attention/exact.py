"""Exact causal attention (SPEC.md A.1, A.3, A.6): flash-attn where installed and fit, else torch's SDPA.

Dimensions: B batch, T context, H query heads, G key/value heads, S head size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_mask(
    context_tokens: int, documents_BT: Tensor | None, window_tokens: int | None, device: torch.device
) -> Tensor | None:
    """True where a query (row) sees a key (column), shape (T, T) or (B, 1, T, T); None: plain causal."""
    windowed = window_tokens is not None and window_tokens < context_tokens
    if documents_BT is None and not windowed:
        return None
    position = torch.arange(context_tokens, device=device)
    distance = position[:, None] - position[None, :]
    seen = distance >= 0
    if windowed:
        seen = seen & (distance < window_tokens)
    if documents_BT is None:
        return seen
    return seen & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])


def exact_attention(
    q_BTHS: Tensor, k_BTGS: Tensor, v_BTGS: Tensor, mask: Tensor | None, window_tokens: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(S)) v, causal; output_BTHS.

    Args:
        mask: from `attention_mask`; None for plain causal attention.
        window_tokens: the window that `mask` expresses; flash-attn takes it as a number instead.
    """
    if _flash_fits(q_BTHS) and (mask is None or mask.ndim == 2):
        window = (-1, -1) if window_tokens is None else (window_tokens - 1, 0)
        return _flash().flash_attn_func(q_BTHS, k_BTGS, v_BTGS, causal=True, window_size=window)
    output_BHTS = F.scaled_dot_product_attention(
        q_BTHS.transpose(1, 2),
        k_BTGS.transpose(1, 2),
        v_BTGS.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BTHS.shape[2] != k_BTGS.shape[2],  # on CPU faster than repeating keys and values
    )
    return output_BHTS.transpose(1, 2)


@functools.cache
def _flash() -> Any:
    """The flash_attn module, or None where it is not installed."""
    return importlib.import_module("flash_attn") if importlib.util.find_spec("flash_attn") else None


def _flash_fits(q_BTHS: Tensor) -> bool:
    """flash-attn 2 takes fp16 and bf16, head sizes up to 256 in eights, on compute capability 8 and later."""
    if not q_BTHS.is_cuda or q_BTHS.dtype not in (torch.float16, torch.bfloat16):
        return False
    size = q_BTHS.shape[-1]
    return size <= 256 and size % 8 == 0 and torch.cuda.get_device_capability()[0] >= 8 and bool(_flash())
