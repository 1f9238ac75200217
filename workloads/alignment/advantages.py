"""How much better than expected each token was: GAE, and the estimators that need no critic. All without
gradient, none whitened unless it says so. docs/theory C.2, C.4, C.6.

Dimensions: B batch, T response tokens. Masks may have holes (tool output, a turn of somebody else).
"""

from __future__ import annotations

import torch
from torch import Tensor

from escala.contract.errors import SpecError
from workloads.alignment.masked import moments, same_shape, wide


@torch.no_grad()
def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T), 0 where masked, not whitened (Schulman et al. 2016, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns = A + V. Here t+1 is the next
    valid token: holes are skipped, value and advantage carried over them, whatever they hold.

    Args:
        values_BT: the value before token t.
        bootstrap_B: the value after a response's last token, for a truncated one; None: 0.

    Raises:
        ValueError: shapes differ.
    """
    same_shape(rewards_BT=rewards_BT, values_BT=values_BT, mask_BT=mask_BT)
    batch, tokens = rewards_BT.shape
    keep = mask_BT.bool()
    rewards, values = torch.where(keep, wide(rewards_BT), 0.0), torch.where(keep, wide(values_BT), 0.0)
    if bootstrap_B is None:
        bootstrap_B = values.new_zeros(batch)
    same_shape(first_column=mask_BT[:, 0], bootstrap_B=bootstrap_B)
    # The next valid position, `tokens` after the last: values with the bootstrap as one more column are read there.
    positions = torch.where(keep, torch.arange(tokens, device=keep.device), tokens)
    after = positions.flip(1).cummin(1).values.flip(1)
    after = torch.cat([after[:, 1:], after.new_full((batch, 1), tokens)], dim=1)
    next_values = torch.cat([values, wide(bootstrap_B).unsqueeze(1)], dim=1).gather(1, after)
    delta_TB = torch.where(keep, rewards + gamma * next_values - values, 0.0).T.contiguous()
    # Over a hole the advantage is carried: times 1, plus 0. One fused operation a step, over all of B.
    decay_TB = torch.ones_like(delta_TB).masked_fill_(keep.T, gamma * lam)
    for t in range(tokens - 2, -1, -1):
        delta_TB[t].addcmul_(decay_TB[t], delta_TB[t + 1])
    advantages = torch.where(keep, delta_TB.T, 0.0)
    return advantages, advantages + values


@torch.no_grad()
def whiten(advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(A - mean) * rsqrt(variance + 1e-8), the variance unbiased, over the valid tokens of ALL ranks; 0 where
    masked. Give it the whole rollout batch, before it is cut into minibatches. docs/theory C.4.

    A collective call where torch.distributed is initialised. A single valid token becomes 0.
    """
    same_shape(advantages_BT=advantages_BT, mask_BT=mask_BT)
    keep = mask_BT.bool()
    x = wide(advantages_BT)
    count, mean, squares = moments(x, keep)
    scale = torch.rsqrt(squares / (count - 1).clamp(min=1) + 1e-8)
    return torch.where(keep, (x.double() - mean) * scale, 0.0).to(x.dtype)


def _groups(rewards_B: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index of each row's group (B,), rows per group (G,), sums of rewards per group (G,) in float64)."""
    same_shape(rewards_B=rewards_B, groups_B=groups_B)
    names, index_B, count_G = torch.unique(groups_B, return_inverse=True, return_counts=True)
    if (count_G < 2).any():
        alone = names[count_G < 2].tolist()
        raise SpecError(
            f"one response alone has no group to be compared with (groups {alone[:5]})",
            "sample at least two responses a prompt and keep them on one rank, or use GAE",
        )
    return (
        index_B,
        count_G,
        rewards_B.new_zeros(len(names), dtype=torch.float64).index_add_(0, index_B, rewards_B.double()),
    )


@torch.no_grad()
def grpo(rewards_B: Tensor, groups_B: Tensor, by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """(R - group mean) / (group std + eps), the std unbiased (Shao et al. 2024); (B,). `to_tokens` spreads it.

    Args:
        groups_B: the same integer for the responses to one prompt; every group lies whole on this rank.
        by_std: False is Dr. GRPO, R - group mean (Liu et al. 2025): dividing weights easy and hard prompts up.

    Raises:
        SpecError: a group of one.
    """
    index_B, count_G, sum_G = _groups(rewards_B, groups_B)
    deviation_B = rewards_B.double() - (sum_G / count_G)[index_B]
    if by_std:
        squares_G = torch.zeros_like(sum_G).index_add_(0, index_B, deviation_B.square())
        deviation_B = deviation_B / ((squares_G / (count_G - 1)).sqrt() + eps)[index_B]
    return deviation_B.to(wide(rewards_B).dtype)


@torch.no_grad()
def rloo(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """R - the mean of the group's other responses (Kool et al. 2019; Ahmadian et al. 2024); (B,).

    Raises:
        SpecError: a group of one.
    """
    index_B, count_G, sum_G = _groups(rewards_B, groups_B)
    rewards = rewards_B.double()
    others_B = (sum_G[index_B] - rewards) / (count_G - 1)[index_B]
    return (rewards - others_B).to(wide(rewards_B).dtype)


def reinforce_plus_plus(rewards_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted return-to-go of the token rewards r' (KL penalty included), whitened over the batch of all ranks
    (Hu 2025); (B, T). A collective call, as `whiten`.
    """
    returns_BT, _ = gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, 1.0)
    return whiten(returns_BT, mask_BT)


def to_tokens(advantages_B: Tensor, mask_BT: Tensor) -> Tensor:
    """A sequence's advantage on each of its valid tokens, 0 elsewhere: (B, T)."""
    same_shape(advantages_B=advantages_B, first_column=mask_BT[:, 0])
    return torch.where(mask_BT.bool(), advantages_B.unsqueeze(1), 0.0)
