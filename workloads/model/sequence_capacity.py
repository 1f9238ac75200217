"""Which choices of a sequence find a place, in evaluation and generation: counted over its own positions alone, so that
a text does not depend on its neighbours in the batch (docs/theory B.5).

Dimensions: B sequences, T successive positions of each, E experts, K experts of a token.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

FINEST = 10**9  # the greatest denominator of a share: its product with a position stays a 64-bit number


def bounds(positions: Tensor, factor: float, k: int, experts: int) -> Tensor:
    """C(t) = ceil(factor (t + 1) k / E): how many choices an expert may have taken at each of `positions` t, which
    count from 0 at the sequence's first token. int64, of their shape.

    It is computed in whole numbers of the factor as it is written: 1.1 is 11/10, and an exact multiple is not rounded
    up.
    """
    over, under = _share(factor, k, experts)
    return (((positions + 1) * over + (under - 1)) // under).clamp(min=1)


@lru_cache
def _share(factor: float, k: int, experts: int) -> tuple[int, int]:
    """factor k / E as a fraction, at most 1: no expert is chosen twice by a token."""
    share = min(Fraction(str(float(factor))) * k / experts, Fraction(1)).limit_denominator(FINEST)
    return share.numerator, share.denominator


def keep(experts_BTK: Tensor, bound_BT: Tensor, taken_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Which choices find a place, kept_BTK (bool), and what each expert has taken after the last position, (B, E).

    Position by position a choice of r is kept if a_r < C(t), and then a_r is one more. With X(t) the choices of r up to
    t, of these positions, that is a(t) = X(t) + min(a(before), min over s <= t of C(s) - X(s)), since C does not fall.

    Args:
        experts_BTK: the chosen experts, of a token all different.
        bound_BT: `bounds` at the positions.
        taken_BE: a before the first of them.
    """
    chosen_BTE = taken_BE.new_zeros(*bound_BT.shape, taken_BE.shape[1]).scatter_(2, experts_BTK, 1)
    count_BTE, taken_B1E = chosen_BTE.cumsum(1), taken_BE.unsqueeze(1)
    room_BTE = (bound_BT.unsqueeze(2) - count_BTE).cummin(1).values
    after_BTE = count_BTE + torch.minimum(taken_B1E, room_BTE)
    before_BTE = torch.cat([taken_B1E, after_BTE[:, :-1]], 1)
    return (after_BTE > before_BTE).gather(2, experts_BTK), after_BTE[:, -1]


def keep_next(experts_BK: Tensor, bound_B: Tensor, taken_BE: Tensor) -> tuple[Tensor, Tensor]:
    """`keep` of one position of each sequence: kept_BK, and what is taken after it, (B, E)."""
    kept_BK = taken_BE.gather(1, experts_BK) < bound_B.unsqueeze(1)
    return kept_BK, taken_BE.scatter_add(1, experts_BK, kept_BK.to(taken_BE.dtype))
