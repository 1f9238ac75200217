"""AdamW as every training run uses it, with DeepSpeed and without."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from escala.schema import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and the rest (norms, biases), which do not. A tied weight counts
    once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(settings: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """torch's fused AdamW of `groups`, at a learning rate of 0 until the schedule sets one."""
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )
