"""Matrices that take less room: codes of 2 to 8 bits, bf16, factors of low rank (docs/theory E.2, E.3, E.6)."""

from __future__ import annotations

from workloads.model.compression.assign import assign_bits
from workloads.model.compression.quantize import quantize
from workloads.model.compression.quantized import QuantizedWeight
from workloads.model.compression.spectrum import Spectrum, spectrum

__all__ = ["QuantizedWeight", "Spectrum", "assign_bits", "quantize", "spectrum"]
