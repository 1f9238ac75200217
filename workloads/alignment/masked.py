"""Reductions over the valid slots of a batch. What a masked slot holds, NaN and infinity included, reaches neither
a value nor a gradient: it is taken out by `where` before anything is multiplied (0 * NaN is NaN, in backward too).

Dimensions: B batch, T response tokens. A mask is bool or 0/1; it may have holes.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in at least fp32: half precision is widened, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def same_shape(**tensors: Tensor) -> None:
    """Refuse tensors that broadcasting would combine without a word, such as (B,) with (B, T) where B = T.

    Raises:
        ValueError: the shapes differ.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must be equal: {shapes}")


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over all valid slots, a scalar; 0 when there is none. Backward through whatever made x multiplies its
    zero gradients, so a masked NaN must be taken out before x is computed, not only here.
    """
    keep = mask_BT.bool()
    return torch.where(keep, x_BT, 0.0).sum() / keep.sum().clamp(min=1)


def sequence_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the rows with a valid slot of each row's mean over its valid slots, a scalar; 0 without any."""
    keep = mask_BT.bool()
    mean_B = torch.where(keep, x_BT, 0.0).sum(-1) / keep.sum(-1).clamp(min=1)
    return mean_B.sum() / keep.any(-1).sum().clamp(min=1)


def _add_over_ranks(x: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


@torch.no_grad()
def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, sum of squared deviations from the mean) of the valid slots, float64 scalars.

    Over all ranks of torch.distributed when it is initialised; then a collective call. Two passes: the mean of
    squares less the square of the mean loses every digit once |mean| is far above the deviation.
    """
    keep = mask.bool()
    x64 = torch.where(keep, x, 0.0).double()
    count, total = _add_over_ranks(torch.stack([keep.sum().double(), x64.sum()]))
    mean = total / count.clamp(min=1)
    squares = _add_over_ranks(torch.where(keep, x64 - mean, 0.0).square().sum())
    return count, mean, squares
