"""A matrix as codes of 2 to 8 bits with scales in 16 bits.

Dimensions: O outputs, I inputs, G groups of inputs in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

SIGNED_BITS = 8
"""Codes of so many bits are signed and have no offset (GGUF's Q8_0); smaller ones count from 0 (Q4_1)."""


@dataclass(frozen=True)
class QuantizedWeight:
    """weight = code * scale + offset, each product and sum rounded once to fp32: GGUF's Q8_0 and Q4_1.

    Args:
        bits: of a code.
        shape: (O, I).
        codes: of 8 bits: int8, (O, I). Of fewer: uint8, (O, bytes of a row), the first code in the lowest bits.
        scale_OG: bf16, or fp16 where a file has it so.
        offset_OG: of the same dtype; None where codes are signed.
    """

    bits: int
    shape: tuple[int, int]
    codes: Tensor
    scale_OG: Tensor
    offset_OG: Tensor | None = None

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scale_OG.shape[1]

    @property
    def nbytes(self) -> int:
        """As stored: codes, scales and offsets."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by the names that a state dictionary has."""
        found = {"codes": self.codes, "scale": self.scale_OG}
        return found if self.offset_OG is None else {**found, "offset": self.offset_OG}

    def with_tensors(self, tensors: dict[str, Tensor]) -> QuantizedWeight:
        """The same with other `tensors` of the same shapes (on another device, or of other weights)."""
        return replace(
            self, codes=tensors["codes"], scale_OG=tensors["scale"], offset_OG=tensors.get("offset")
        )

    def unpacked_OI(self) -> Tensor:
        """The codes, one a number: int8 where they are signed, else uint8."""
        return self.codes if self.bits == SIGNED_BITS else unpack_codes(self.codes, self.bits, self.shape[1])

    def dequantize(self) -> Tensor:
        """weight_OI in fp32."""
        outputs, groups = self.scale_OG.shape
        weight_OGg = self.unpacked_OI().view(outputs, groups, -1).float()  # a copy: codes are integers
        weight_OGg *= self.scale_OG.float().unsqueeze(-1)
        if self.offset_OG is not None:
            weight_OGg += self.offset_OG.float().unsqueeze(-1)
        return weight_OGg.view(self.shape)


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes (uint8, below 2^bits) without holes: uint8 (O, ceil(I * bits / 8)), the first code in the lowest bits."""
    if bits == 4 and codes_OI.shape[1] % 2 == 0:
        return codes_OI[:, ::2] | (codes_OI[:, 1::2] << 4)
    flat_OB = _bits(codes_OI, bits)
    return _bytes(F.pad(flat_OB, (0, -flat_OB.shape[1] % 8)), 8)


def unpack_codes(packed: Tensor, bits: int, inputs: int) -> Tensor:
    """The codes_OI that `pack_codes` packed."""
    if bits == 4 and inputs % 2 == 0:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    return _bytes(_bits(packed, 8)[:, : inputs * bits], bits)


def _bits(numbers: Tensor, count: int) -> Tensor:
    """The lowest `count` bits of each number of a row, one after another, the lowest first."""
    places = torch.arange(count, dtype=torch.uint8, device=numbers.device)
    return (numbers.unsqueeze(-1).bitwise_right_shift(places) & 1).flatten(1)


def _bytes(bits_OB: Tensor, count: int) -> Tensor:
    """The numbers that `count` bits each make."""
    places = torch.arange(count, dtype=torch.uint8, device=bits_OB.device)
    shifted_OIb = bits_OB.view(len(bits_OB), -1, count).bitwise_left_shift(places)
    return torch.sum(shifted_OIb, -1, dtype=torch.int32).to(torch.uint8)
