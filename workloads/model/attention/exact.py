"""Exact causal attention (docs/theory A.1, A.3): flash-attn where installed and fit, else torch's SDPA; in generation
over a paged cache (see `paged`).

Dimensions: B batch, T context, H query heads, G key/value heads, S head size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from escala.schema import ModelConfig
from workloads.model.attention.paged import PagedCache
from workloads.model.attention.registry import AttentionModule


class Exact(AttentionModule):
    """softmax(q k^T / sqrt(S)) v over all keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config

    def prepare(self, context_tokens: int, documents_BT: Tensor | None, device: torch.device) -> Any:
        """The mask: True where a query (row) sees a key (column), shape (B, 1, T, T); None: plain causal."""
        if documents_BT is None:
            return None
        position = torch.arange(context_tokens, device=device)
        seen = position[:, None] >= position[None, :]
        return seen & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])

    def attend(self, q_BTHS: Tensor, k_BTGS: Tensor, v_BTGS: Tensor, prepared: Any) -> Tensor:
        """See AttentionModule."""
        if prepared is None and flash_fits(q_BTHS):
            return flash_attention(q_BTHS, k_BTGS, v_BTGS)
        q_BHTS, k_BGTS, v_BGTS = (x.transpose(1, 2) for x in (q_BTHS, k_BTGS, v_BTGS))
        each = q_BTHS.shape[2] // k_BTGS.shape[2]
        if each > 1 and not _takes_grouped_heads(q_BTHS, prepared):
            k_BGTS, v_BGTS = (x.repeat_interleave(each, dim=1) for x in (k_BGTS, v_BGTS))
        output_BHTS = F.scaled_dot_product_attention(
            q_BHTS,
            k_BGTS,
            v_BGTS,
            attn_mask=prepared,
            is_causal=prepared is None,
            enable_gqa=q_BHTS.shape[1] != k_BGTS.shape[1],
        )
        return output_BHTS.transpose(1, 2)

    @classmethod
    def decode_state(cls, layers: Sequence[Self], blocks: int, block_tokens: int, like: Tensor) -> PagedCache:
        """A cache of keys and values."""
        config = layers[0]._config
        return PagedCache(config, blocks, block_tokens, like, config.window_tokens)


make_attention = Exact


def flash_attention(
    q_BTHS: Tensor, k_BTGS: Tensor, v_BTGS: Tensor, window_tokens: int | None = None
) -> Tensor:
    """Causal output_BTHS by flash-attn, where `flash_fits`; over the last `window_tokens` keys, or all."""
    window = (-1, -1) if window_tokens is None else (window_tokens - 1, 0)
    out: Tensor = _flash().flash_attn_func(q_BTHS, k_BTGS, v_BTGS, causal=True, window_size=window)
    return out


@functools.cache
def _flash() -> Any:
    """The flash_attn module, or None where it is not installed."""
    return importlib.import_module("flash_attn") if importlib.util.find_spec("flash_attn") else None


def _takes_grouped_heads(q_BTHS: Tensor, mask: Tensor | None) -> bool:
    """Whether SDPA has a fast kernel for fewer key/value heads: on CPU, where it beats repeating them; on CUDA in half
    precision and without a mask. Its memory-efficient kernel, which takes the rest, wants equal heads; without it all
    scores, (B, H, T, T), would be in memory.
    """
    if q_BTHS.device.type == "cpu":
        return True
    return mask is None and q_BTHS.dtype in (torch.float16, torch.bfloat16)


def flash_fits(q_BTHS: Tensor) -> bool:
    """flash-attn 2 takes fp16 and bf16, head sizes up to 256 in eights, on compute capability 8 and later."""
    if not q_BTHS.is_cuda or q_BTHS.dtype not in (torch.float16, torch.bfloat16):
        return False
    size = q_BTHS.shape[-1]
    return size <= 256 and size % 8 == 0 and torch.cuda.get_device_capability()[0] >= 8 and bool(_flash())
