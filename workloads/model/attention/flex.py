"""The keys near by on CUDA, by torch's flex_attention, compiled to a kernel that skips the blocks that no query sees
(Dong et al. 2024, arXiv:2412.05496). Not run on a GPU by us yet: tests/gpu/test_attention.py compares it with the
block-wise path.

Dimensions: B batch, N batch x key/value heads, E query heads of each, H query heads, G key/value heads, T context, S
head size.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from workloads.model.attention.layout import Packing, accumulated

LEAST_HEAD_SIZE = 16  # of its kernels, as of torch 2.13
LEAST_CAPABILITY = 8  # Triton's, for bf16


def flex_fits(q: Tensor) -> bool:
    """Whether its kernels take queries (..., S): CUDA with Triton, up to fp32."""
    if not q.is_cuda or q.dtype == torch.float64 or q.shape[-1] < LEAST_HEAD_SIZE:
        return False
    return torch.cuda.get_device_capability(q.device)[0] >= LEAST_CAPABILITY and _has_triton()


def flex_mask(packed: Packing, window_tokens: int | None, block_tokens: int | None) -> BlockMask:
    """Which blocks of keys each block of queries sees; once for all layers of a forward pass."""
    documents_BT, tokens = packed.documents_BT, packed.context_tokens

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if window_tokens is not None:
            seen = seen & (query - key < window_tokens)
        if block_tokens is not None:
            seen = seen & (query // block_tokens - key // block_tokens <= 1)
        if documents_BT is not None:
            seen = seen & (documents_BT[row, query] == documents_BT[row, key])
        return seen

    rows = None if documents_BT is None else len(documents_BT)
    mask: BlockMask = _compiled(create_block_mask)(sees, rows, None, tokens, tokens, device=packed.device)
    return mask


def flex_local(
    q_NETS: Tensor, k_NTS: Tensor, v_NTS: Tensor, mask: BlockMask, batch: int
) -> tuple[Tensor, Tensor]:
    """(out_NETS, lse_NET) in fp32, as `local.local_attention`; products are rounded to the dtype of q."""
    kind = accumulated(q_NETS.dtype)
    q_BHTS = q_NETS.reshape(batch, -1, *q_NETS.shape[2:])
    k_BGTS, v_BGTS = (x.reshape(batch, -1, *x.shape[1:]) for x in (k_NTS, v_NTS))
    out_BHTS, found = _compiled(flex_attention)(
        q_BHTS,
        k_BGTS,
        v_BGTS,
        block_mask=mask,
        enable_gqa=q_NETS.shape[1] > 1,
        return_aux=AuxRequest(lse=True),
    )
    lse_NET: Tensor = found.lse.view(q_NETS.shape[:3]).to(kind)
    return out_BHTS.reshape(q_NETS.shape).to(kind), lse_NET


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Uncompiled, both would hold T x T numbers."""
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
