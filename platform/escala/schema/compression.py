"""How matrices are stored smaller: what may be asked of an engine, and what a compressed model says of each matrix."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, Self

from pydantic import Field, model_validator

from escala.schema.base import StoredPath, Strict

Precision = Literal["fp32", "bf16", "int8", "int4"]
"""Of an engine's weights: int8 and int4 store the matrices of the blocks smaller, all else stays in fp32."""
BITS: dict[str, Literal[4, 8]] = {"int8": 8, "int4": 4}
GROUP = 32
"""Inputs that share a scale under int4, where nothing else is said."""


def is_kept(name: str, patterns: Iterable[str]) -> bool:
    """Whether a matrix matches one of the patterns of those that stay as they are."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class MatrixChoice(Strict):
    """How one matrix is stored: `bits` a weight, or as a product of two factors of `rank`."""

    bits: Literal[2, 3, 4, 5, 6, 8, 16] = Field(
        16, description="codes of so many bits; 16: bf16. Of the factors where there is a rank: 16"
    )
    group: int | None = Field(
        None, gt=0, description="inputs that share a scale; None: all of an output's. Not with 16 bits"
    )
    method: Literal["hqq", "round"] = Field("hqq", description="how codes are chosen below 8 bits")
    rank: int | None = Field(None, gt=0, description="of the truncated SVD; None: the matrix is whole")

    @model_validator(mode="after")
    def _one_kind(self) -> MatrixChoice:
        if self.bits == 16 and self.group is not None:
            raise ValueError("16 bits have no scales: leave group out")
        if self.bits != 16 and self.rank is not None:
            raise ValueError("the factors of a low rank are stored in 16 bits: leave bits out")
        return self


class QuantizationConfig(Strict):
    """How an engine's matrices are quantised under precision int8 or int4."""

    group: Literal[32, 128] | None = Field(
        None,
        description="inputs that share a scale; None: int8 has one per output channel, int4 groups of 32",
    )
    method: Literal["hqq", "round"] = Field(
        "hqq",
        description="how 4-bit codes are chosen: half-quadratic (Badri & Shaji 2023), or the nearest one",
    )
    calibration: StoredPath | None = Field(
        None,
        description="a text file whose activations scale the weights before they are rounded (Lin et al. 2023); None: "
        "no scaling",
    )
    keep: list[str] = Field(
        [], description="patterns of matrices that stay as they are: blocks.0.*, *.feed_forward.down"
    )

    def choice(self, precision: Precision) -> MatrixChoice:
        """Of a block's matrix under int8 or int4."""
        bits = BITS[precision]
        return MatrixChoice(bits=bits, group=self.group or (GROUP if bits == 4 else None), method=self.method)


class StoredWeights(Strict):
    """In what a model that is read alone has its weights: an engine's, a judge's, a reward model's."""

    precision: Precision = Field(
        "fp32",
        description="of the weights; int8, int4: the blocks' matrices in codes, with a scale for each output or group, "
        "and all else in fp32",
    )
    quantization: QuantizationConfig = Field(QuantizationConfig(), description="how, under int8 and int4")

    @model_validator(mode="after")
    def _has_codes(self) -> Self:
        if self.precision not in BITS and self.quantization != QuantizationConfig():
            raise ValueError(f"quantization has no use under precision {self.precision}: leave it out")
        return self
