"""The workloads `bench` and `bench_attention`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from escala.schema.attention import KINDS
from escala.schema.base import Strict
from escala.schema.model import ModelConfig
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


class AttentionBenchConfig(Strict):
    """The `bench_attention` workload: one layer of attention of each kind, one sequence, one worker."""

    kinds: list[str] = Field(
        sorted(KINDS), min_length=1, description="of attention; without exact nothing overtakes it"
    )
    contexts: list[int] = Field(
        [1 << power for power in range(8, 17)], min_length=1, description="T of the sequences, in tokens"
    )
    heads: int = Field(4, gt=0, description="query and key/value heads")
    head_size: int = Field(64, gt=0, description="width of a head")
    window_tokens: int = Field(512, gt=0, description="of the kinds that have a window")
    features: int = Field(256, gt=0, description="width of phi, of the kinds that have features")
    precisions: list[Literal["fp32", "bf16"]] = Field(["fp32"], min_length=1, description="each is measured")
    seconds: float = Field(
        0.3, gt=0, description="for each figure, at least three calls; one where it takes 30 times as long"
    )
    max_call_seconds: float = Field(
        120.0, gt=0, description="a context whose call would take longer is left out, by the kind's FLOPs"
    )
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("kinds")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        unknown = [name for name in value if name not in KINDS]
        if unknown:
            raise ValueError(f"there is no attention {unknown[0]!r}: one of {', '.join(KINDS)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> AttentionBenchConfig:
        if min(self.contexts) < 1:
            raise ValueError("contexts: a sequence has at least one token")
        if self.resources.workers != 1:
            raise ValueError("one worker measures: leave resources.workers at 1")
        for kind in self.kinds:
            self.layer(kind)
        return self

    def layer(self, kind: str) -> ModelConfig:
        """The model whose one layer of attention is measured. Raises ValueError where the options do not fit it."""
        section = KINDS.read(kind)
        return ModelConfig.model_validate(
            {
                "n_layers": 1,
                "d_model": self.heads * self.head_size,
                "n_heads": self.heads,
                "max_context_tokens": max(self.contexts) + 1,
                "attention": kind,
                "window_tokens": self.window_tokens if section.window_tokens else None,
                "features": {"count": self.features} if section.features else None,
            }
        )
