"""The `bench` workload."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from escala.schema.base import Strict
from escala.schema.training import ResourcesConfig


class BenchConfig(Strict):
    """The `bench` workload: what it measures on every worker at once."""

    widths: list[int] = Field([256, 512, 1024], min_length=1, description="d_model of the blocks")
    tokens: int = Field(512, gt=0, description="of a micro-batch")
    context_tokens: int = Field(256, gt=0, description="of a sequence; divides tokens")
    vocab_size: int = Field(4096, gt=0, description="of the unembedding that is measured")
    precisions: list[Literal["fp32", "bf16"]] = Field(
        ["fp32", "bf16"], min_length=1, description="each is measured"
    )
    seconds: float = Field(3.0, gt=0, description="for each figure")
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _whole(self) -> BenchConfig:
        if self.tokens % self.context_tokens:
            raise ValueError(f"tokens {self.tokens} are no whole sequences of {self.context_tokens}")
        return self
