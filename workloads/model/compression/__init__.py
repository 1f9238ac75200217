"""Matrices that take less room: codes of 2 to 8 bits, bf16, factors of low rank (docs/theory E.2, E.3, E.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workloads.model.compression.quantize import quantize
from workloads.model.compression.quantized import QuantizedWeight
from workloads.model.compression.spectrum import Spectrum, spectrum

if TYPE_CHECKING:
    from workloads.model.compression.assign import assign_bits

__all__ = ["QuantizedWeight", "Spectrum", "assign_bits", "quantize", "spectrum"]


def __getattr__(name: str) -> Any:
    """`assign_bits`, which needs numpy and scipy: an engine on a GPU needs torch alone."""
    if name != "assign_bits":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from workloads.model.compression import assign

    return assign.assign_bits
