"""From a score per response to a reward per token, in this order: normalise and clip the score, add the penalties
(after the clip, or a response at its lower end would be free to break the rules), put it on the last valid token,
subtract the KL penalty. docs/theory C.1.

Dimensions: B batch, T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from escala.contract.errors import SpecError
from workloads.alignment.kl import kl
from workloads.alignment.masked import moments, same_shape, wide


@dataclass
class RunningMoments:
    """Mean and spread of every score seen so far. Its three numbers are all its state: `dataclasses.asdict` of it
    goes into a checkpoint, `RunningMoments(**state)` brings it back.
    """

    count: float = 0.0
    mean: float = 0.0
    squared_deviations: float = 0.0

    def update(self, scores_B: Tensor) -> None:
        """Take in a batch, of all ranks where torch.distributed is initialised (Chan et al. 1983). A collective."""
        count, mean, squares = (float(x) for x in moments(scores_B, torch.ones_like(scores_B)))
        total, shift = self.count + count, mean - self.mean
        if total == 0:
            return
        self.mean += shift * count / total
        self.squared_deviations += squares + shift**2 * self.count * count / total
        self.count = total

    def normalise(self, scores_B: Tensor) -> Tensor:
        """(score - mean) * rsqrt(unbiased variance + 1e-8), (B,).

        Raises:
            ValueError: fewer than two scores seen, so there is no spread to divide by.
        """
        if self.count < 2:
            raise ValueError(f"{self.count:g} scores seen, normalisation needs two: call update first")
        variance = self.squared_deviations / (self.count - 1)
        scores = wide(scores_B)
        scale: float = (variance + 1e-8) ** -0.5
        return ((scores.double() - self.mean) * scale).to(scores.dtype)


def missing_eos_penalty(scores_B: Tensor, finished_B: Tensor, penalty: float) -> Tensor:
    """The score less `penalty` where the response was cut off before it ended; (B,).

    Args:
        finished_B: whether the response ended by itself, bool.
    """
    same_shape(scores_B=scores_B, finished_B=finished_B)
    return scores_B - penalty * (~finished_B.bool()).to(scores_B.dtype)


def length_penalty(
    scores_B: Tensor, lengths_B: Tensor, free_tokens: int, limit_tokens: int, penalty: float
) -> Tensor:
    """The score less 0 up to `free_tokens`, `penalty` from `limit_tokens` on, a line between (Yu et al. 2025,
    DAPO eq. 13); (B,).

    Raises:
        SpecError: the limit is not above the free length.
    """
    same_shape(scores_B=scores_B, lengths_B=lengths_B)
    if limit_tokens <= free_tokens:
        raise SpecError(
            f"the length penalty ends at {limit_tokens} tokens but starts at {free_tokens}",
            "set the limit above the free length",
        )
    scores = wide(scores_B)
    over_B = (lengths_B.to(scores.dtype) - free_tokens) / (limit_tokens - free_tokens)
    return scores - penalty * over_B.clamp(0.0, 1.0)


def on_last_token(scores_B: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, T): the score on the last valid token, 0 elsewhere. A row without a valid token has no place for it.

    Raises:
        ValueError: a row without a valid token has a score other than 0.
    """
    same_shape(scores_B=scores_B, first_column=mask_BT[:, 0])
    keep = mask_BT.bool()
    if ((scores_B != 0) & ~keep.any(-1)).any():
        raise ValueError("a response without a valid token has a score")
    positions = torch.arange(keep.shape[1], device=keep.device)
    last_B1 = torch.where(keep, positions, -1).amax(-1, keepdim=True)
    return torch.where(keep & (positions == last_B1), wide(scores_B).unsqueeze(1), 0.0)


@torch.no_grad()
def token_rewards(
    scores_B: Tensor, logp_old_BT: Tensor, logp_ref_BT: Tensor, mask_BT: Tensor, kl_coef: float
) -> Tensor:
    """r'_t = r_t - kl_coef (log pi_old - log pi_ref), the score on the last valid token; (B, T), 0 where masked.

    Raises:
        ValueError: shapes differ, or a scored response has no valid token.
    """
    same_shape(logp_old_BT=logp_old_BT, logp_ref_BT=logp_ref_BT, mask_BT=mask_BT)
    penalties_BT = kl_coef * kl(logp_old_BT, logp_ref_BT, "k1")
    return torch.where(mask_BT.bool(), on_last_token(scores_B, mask_BT) - penalties_BT, 0.0)
