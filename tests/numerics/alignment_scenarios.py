"""What each of test_alignment_ranks.py's two ranks makes of its rows of one batch; the test runs `results` on all of
them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workloads.alignment.advantages import reinforce_plus_plus, whiten
from workloads.alignment.calibration import explained_variance
from workloads.alignment.losses import entropy, loss_count, policy_loss, value_loss
from workloads.alignment.token_rewards import RunningMoments

ROWS = [slice(0, 6), slice(6, 9)]  # ranks of unequal size
B, T, V = 9, 12, 7


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(B, T, generator=generator)
        for name in ("logp", "old", "rewards", "values", "returns")
    }
    drawn["mask"] = torch.rand(B, T, generator=generator) < 0.6
    drawn["mask"][0] = False
    drawn["rewards"] = drawn["rewards"] + 100.0  # a mean far above the deviation
    drawn["logits"] = torch.randn(B, T, V, generator=generator)
    return drawn


def add(x: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def over_ranks(loss: Tensor, count: Tensor, weight: Tensor) -> dict[str, float]:
    """The loss and its gradient by one shared weight, as a trainer weights and adds them."""
    share = loss * count / add(count.clone())
    (gradient,) = torch.autograd.grad(share, weight)
    return dict(zip(("loss", "gradient"), add(torch.stack([share.detach(), gradient])).tolist(), strict=True))


def results(part: dict[str, Tensor]) -> dict[str, Any]:
    mask, weight = part["mask"], torch.ones((), requires_grad=True)
    advantages = whiten(part["rewards"], mask)
    running = RunningMoments()
    for column in (0, 1):
        running.update(part["rewards"][:, column])
    result: dict[str, Any] = {
        "whitened": advantages.tolist(),
        "reinforce++": reinforce_plus_plus(part["rewards"], mask, 0.9).tolist(),
        "running": dataclasses.asdict(running),
        "explained": float(explained_variance(part["values"], part["returns"], mask)),
    }
    for mode in ("token", "sequence_mean", "gspo"):
        logp = 0.3 * weight * part["logp"]
        loss = policy_loss(logp, 0.3 * part["old"], advantages, mask, 0.2, 0.2, mode=mode)
        result[mode] = over_ranks(loss, loss_count(mask, mode), weight)
    loss = value_loss(weight * part["values"], part["values"], part["returns"], mask, 0.2)
    result["value"] = over_ranks(loss, loss_count(mask), weight)
    result["entropy"] = over_ranks(entropy(weight * part["logits"], mask), loss_count(mask), weight)
    return result


def scenario(_: Path) -> dict[str, Any]:
    return results({name: x[ROWS[dist.get_rank()]] for name, x in batch().items()})
