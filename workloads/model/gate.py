"""Which experts a token goes to, with what weight, and in which order their slots fill (docs/theory B.1 to B.3, B.5).

Dimensions: B batch, T context, N = B T tokens, E experts, K experts that compute a token, S slots: the (token, expert)
pairs that are computed, sorted by expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from escala.schema.moe import Estimator


@dataclass(frozen=True)
class Choice:
    """Experts of each token, the likeliest first, and what their outputs count."""

    experts_NK: Tensor
    weights_NK: Tensor


def top_k(logits_NE: Tensor, k: int) -> Choice:
    """The k largest logits; weights softmax(logits), for k >= 2 renormalised over the chosen.

    For k = 1 they are not: renormalised, the weight would be 1 and the router would get no gradient of the task (Fedus
    et al. 2022, equation 2). The choice is constant almost everywhere, so the derivative is exact.
    """
    chosen_NK, experts_NK = logits_NE.topk(k, dim=-1)
    return Choice(experts_NK, _weights(logits_NE, chosen_NK))


def _weights(logits_NE: Tensor, chosen_NK: Tensor) -> Tensor:
    if chosen_NK.shape[-1] > 1:
        return chosen_NK.softmax(dim=-1)  # the full softmax over all experts, renormalised, is this
    return (chosen_NK - logits_NE.logsumexp(dim=-1, keepdim=True)).exp()


def choose(logits_NE: Tensor, k: int, estimator: Estimator, tau: float) -> Choice:
    """The choice in training.

    top_k: see `top_k`. straight_through (Bengio et al. 2013): the values of top_k, the derivative of the full softmax
    in the chosen ones, so that a token also moves the logits that it did not choose. gumbel: k experts drawn without
    replacement from softmax(logits / tau) (Kool et al. 2019), as the largest of logits + tau x Gumbel noise; weights of
    the clean logits. soft_to_hard: all experts, weights softmax(logits / tau).
    """
    if estimator == "soft_to_hard":
        experts_E = torch.arange(logits_NE.shape[-1], device=logits_NE.device)
        return Choice(experts_E.expand(logits_NE.shape), (logits_NE / tau).softmax(dim=-1))
    if estimator == "gumbel":
        gumbel_NE = -torch.empty_like(logits_NE).exponential_().log()
        experts_NK = (logits_NE.detach() + tau * gumbel_NE).topk(k, dim=-1).indices
        return Choice(experts_NK, _weights(logits_NE, logits_NE.gather(-1, experts_NK)))
    choice = top_k(logits_NE, k)
    if estimator == "straight_through":
        soft_NK = logits_NE.softmax(dim=-1).gather(-1, choice.experts_NK)
        return Choice(choice.experts_NK, choice.weights_NK.detach() + (soft_NK - soft_NK.detach()))
    return choice


def capacity(factor: float | None, tokens: int, k: int, experts: int) -> int | None:
    """Slots of each expert in training, for `tokens` of one rank's micro-batch: ceil(factor x tokens x k / E); None: no
    limit.
    """
    return None if factor is None else math.ceil(factor * tokens * k / experts)


@dataclass(frozen=True)
class Dispatch:
    """Slots sorted by expert. Expert e has the next `sizes[e]` of them."""

    choice_S: Tensor  # which of the N K choices has the slot: that of token choice_S // K
    slot_NK: Tensor  # where a token's k-th expert answers; S: nowhere, it was dropped
    sizes: list[int]
    load_E: Tensor  # tokens that chose each expert, dropped ones included


def dispatch(
    experts_NK: Tensor, batch: int, experts: int, limit: int | None, kept_NK: Tensor | None = None
) -> Dispatch:
    """Sort the choices by expert; each expert keeps its first `limit` in the order (position t, choice rank, row b).

    In that order no token takes a slot from one at an earlier position: not by a higher probability, and not as
    somebody's first choice against an earlier one's second (docs/theory B.5).

    Args:
        experts_NK: tokens row by row: token n is position n mod T of row n // T.
        batch: rows B.
        limit: slots of an expert; None: as many as there are choices.
        kept_NK: where there is no limit, which choices have a slot (`sequence_capacity`); None: all.
    """
    n, k = experts_NK.shape
    fill_TKB = torch.arange(n * k, device=experts_NK.device).view(batch, -1, k).permute(1, 2, 0)
    choice_M = fill_TKB.reshape(-1)  # (token, rank) pairs n K + k as slots fill
    expert_M, order_M = experts_NK.reshape(-1)[choice_M].sort(stable=True)
    choice_S = choice_M[order_M]
    load_E = torch.bincount(expert_M, minlength=experts)
    sizes_E = load_E
    if limit is not None:
        start_E = load_E.cumsum(0) - load_E
        place_M = torch.arange(n * k, device=expert_M.device) - start_E[expert_M]
        choice_S = choice_S[place_M < limit]
        sizes_E = load_E.clamp(max=limit)
    elif kept_NK is not None:
        kept_M = kept_NK.reshape(-1)
        choice_S = choice_S[kept_M[choice_S]]
        sizes_E = torch.bincount(experts_NK.reshape(-1)[kept_M], minlength=experts)
    slot_NK = torch.full_like(choice_M, len(choice_S))
    slot_NK[choice_S] = torch.arange(len(choice_S), device=choice_S.device)
    return Dispatch(choice_S, slot_NK.view(n, k), sizes_E.tolist(), load_E)
