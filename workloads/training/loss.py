"""Next-token cross entropy as a sum and a count, so that micro-batches and ranks add up to one batch's mean.

Dimensions: B batch, T context, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# On CPU 8 MB of fp32, so that the softmax stays in cache: 70 ms for 4096 x 4096 logits, 121 in one piece. On a GPU 256
# MB: a launch takes as long as 20 MB of its memory's traffic, and a chunk's fp32 copies still come and go.
CHUNK_LOGITS, GPU_CHUNK_LOGITS = 1 << 21, 1 << 26


def chunk_rows(logits_NV: Tensor) -> int:
    """Rows whose softmax is computed at a time."""
    chunk = CHUNK_LOGITS if logits_NV.device.type == "cpu" else GPU_CHUNK_LOGITS
    return max(1, chunk // logits_NV.shape[-1])


def token_loss(logits_BTV: Tensor, targets_BT: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum of losses in nats, number of tokens counted), both scalars; the sum in fp32.

    Args:
        mask: which targets count, shape (B, T) or broadcastable to it, such as (B, 1); None: all.
    """
    logits = logits_BTV.flatten(0, 1)
    targets = targets_BT.flatten()
    rows = chunk_rows(logits)
    if mask is None:
        count = torch.tensor(targets.numel(), device=targets.device)
    else:
        keep = mask.bool().expand(targets_BT.shape).flatten()
        targets = targets.masked_fill(~keep, -100)
        count = keep.sum()
    total = torch.stack(
        [
            F.cross_entropy(part.float(), wanted, reduction="sum", ignore_index=-100)
            for part, wanted in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
        ]
    ).sum()
    return total, count


def log_probabilities(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log p of each target under its logits, shape (N,), fp32."""
    rows = chunk_rows(logits_NV)
    return torch.cat(
        [
            -F.cross_entropy(part.float(), wanted, reduction="none")
            for part, wanted in zip(torch.split(logits_NV, rows), torch.split(targets_N, rows), strict=True)
        ]
    )


def next_token_loss(engine: Any, tokens_BT1: Tensor) -> Tensor:
    """The summed loss of all next tokens of `tokens_BT1` (T + 1 token ids a row), in nats."""
    total, _ = token_loss(engine(tokens_BT1[:, :-1]), tokens_BT1[:, 1:])
    return total


def distillation_loss(logits_NV: Tensor, exact_NV: Tensor, targets_N: Tensor, kl_weight: float) -> Tensor:
    """Sum over N of -log p(target) + kl_weight KL(exact || model), in nats, fp32 (Hinton et al. 2015, at temperature
    1). No gradient reaches `exact_NV`.
    """
    rows = chunk_rows(logits_NV)
    parts = zip(*(torch.split(x, rows) for x in (logits_NV, exact_NV, targets_N)), strict=True)
    total = []
    for logits, exact, targets in parts:
        logp_NV = logits.float().log_softmax(-1)
        exact_logp_NV = exact.detach().float().log_softmax(-1)
        kl = F.kl_div(logp_NV, exact_logp_NV, reduction="sum", log_target=True)
        total.append(F.nll_loss(logp_NV, targets, reduction="sum") + kl_weight * kl)
    return torch.stack(total).sum()
