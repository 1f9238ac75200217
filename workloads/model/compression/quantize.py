"""Codes for a matrix: the nearest ones, or half-quadratic (docs/theory E.6).

Scales and offsets are rounded to 16 bits before codes are chosen, so that what is stored is what was fitted.

Dimensions: O outputs, I inputs, G groups of inputs in a row, g inputs of a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from escala.contract.errors import SpecError
from workloads.model.compression.quantized import SIGNED_BITS, QuantizedWeight, pack_codes

STORED = torch.bfloat16
"""Of scales and offsets."""
P_NORM, BETA, KAPPA, ROUNDS = 0.7, 10.0, 1.01, 20
"""Of the half-quadratic method: Badri & Shaji 2023's, errors counted in units of the scale."""
CACHED_WEIGHTS = 1 << 15
"""That the rounds work on at a time: 128 KiB stay in a core's cache."""


def quantize(
    weight_OI: Tensor, bits: int, group: int | None = None, method: Literal["hqq", "round"] = "hqq"
) -> QuantizedWeight:
    """`weight_OI` in codes of 2 to 8 bits.

    Args:
        weight_OI: (outputs, inputs), of any float dtype.
        bits: 8: signed codes, symmetric, the nearest ones. Fewer: scale and offset, by `method`.
        group: inputs that share a scale; None: all inputs of an output.
        method: round: offset the group's minimum, the nearest codes. hqq: the offset with the least sum of |error|^0.7
            that its rounds find, never a worse one than round's.

    Raises SpecError where bits are not 2 to 8, the group does not divide the inputs, or a weight is not finite.
    """
    outputs, inputs = weight_OI.shape
    group = inputs if group is None else group
    if not 2 <= bits <= SIGNED_BITS:
        raise SpecError(f"A weight has {bits} bits.", "Give 2 to 8.")
    if group < 1 or inputs % group:
        raise SpecError(
            f"Groups of {group} inputs don't divide a matrix of {inputs} inputs.",
            "Give a group that does, or none: one scale for each output.",
        )
    if not bool(weight_OI.isfinite().all()):
        raise SpecError(
            "A weight is not finite, and has no code.", "Check the model: its training may have diverged."
        )
    weight_OGg = weight_OI.detach().float().view(outputs, -1, group)
    if bits == SIGNED_BITS:
        return _signed(weight_OGg)
    scale_OG1, offset_OG1 = _spanned(weight_OGg, bits)
    if method == "hqq":
        offset_OG1 = _half_quadratic(weight_OGg, scale_OG1, offset_OG1, bits)
    codes_OI = _codes(weight_OGg, scale_OG1, offset_OG1, bits).view(outputs, inputs).to(torch.uint8)
    stored = (scale_OG1.squeeze(-1).to(STORED), offset_OG1.squeeze(-1).to(STORED))
    return QuantizedWeight(bits, (outputs, inputs), pack_codes(codes_OI, bits), *stored)


def _signed(weight_OGg: Tensor) -> QuantizedWeight:
    outputs, groups, size = weight_OGg.shape
    scale_OG1 = _scale(weight_OGg.abs().amax(-1, keepdim=True) / 127)
    codes_OGg = (weight_OGg / scale_OG1).round_().clamp_(-127, 127).to(torch.int8)
    codes_OI = codes_OGg.view(outputs, groups * size)
    return QuantizedWeight(SIGNED_BITS, (outputs, groups * size), codes_OI, scale_OG1.squeeze(-1).to(STORED))


def _spanned(weight_OGg: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale_OG1, offset_OG1) that span each group, as they are stored."""
    low_OG1, high_OG1 = weight_OGg.amin(-1, keepdim=True), weight_OGg.amax(-1, keepdim=True)
    return _scale((high_OG1 - low_OG1) / (2**bits - 1)), _stored(low_OG1)


def _stored(values: Tensor) -> Tensor:
    return values.to(STORED).float()


def _scale(values: Tensor) -> Tensor:
    """As stored; 1 where a group has no spread."""
    stored = _stored(values)
    return stored.masked_fill_(stored == 0, 1.0)


def _codes(weight_OGg: Tensor, scale_OG1: Tensor, offset_OG1: Tensor, bits: int) -> Tensor:
    return ((weight_OGg - offset_OG1) / scale_OG1).round_().clamp_(0, 2**bits - 1)


def _half_quadratic(weight_OGg: Tensor, scale_OG1: Tensor, offset_OG1: Tensor, bits: int) -> Tensor:
    """The offset with the least sum of |error|^p of those that the rounds meet: each splits the error into an outlier
    part, by a shrinkage, and the rest, whose mean the offset takes on.
    """
    rows = max(1, CACHED_WEIGHTS // weight_OGg[0].numel())
    parts = zip(*(torch.split(each, rows) for each in (weight_OGg, scale_OG1, offset_OG1)), strict=True)
    return torch.cat([_better_offset(weight, scale, offset, bits) for weight, scale, offset in parts])


def _better_offset(weight_OGg: Tensor, scale_OG1: Tensor, offset_OG1: Tensor, bits: int) -> Tensor:
    unit_OGg, offset_OG1 = (
        weight_OGg / scale_OG1,
        offset_OG1 / scale_OG1,
    )  # all in units of the scale from here on
    best_OG1, least_OG1, beta = offset_OG1, torch.full_like(offset_OG1, torch.inf), BETA
    for _ in range(ROUNDS):
        error_OGg = unit_OGg - offset_OG1
        error_OGg -= error_OGg.round().clamp_(0, 2**bits - 1)
        size_OGg = error_OGg.abs().clamp_(min=1e-8)
        power_OGg = size_OGg.log().mul_(P_NORM).exp_()
        total_OG1 = power_OGg.sum(-1, keepdim=True)
        best_OG1 = torch.where(total_OG1 < least_OG1, offset_OG1, best_OG1)
        least_OG1 = torch.minimum(total_OG1, least_OG1)
        outlier_OGg = (size_OGg - power_OGg.div_(size_OGg).div_(beta)).clamp_(min=0).copysign_(error_OGg)
        change_OG1 = (error_OGg - outlier_OGg).mean(-1, keepdim=True)
        offset_OG1 = _stored((offset_OG1 + change_OG1) * scale_OG1) / scale_OG1
        beta *= KAPPA
    return _stored(best_OG1 * scale_OG1)
