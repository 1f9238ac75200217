"""The `compress` workload."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from escala.schema.base import StoredPath, Strict
from escala.schema.compression import GROUP
from escala.schema.data import DataConfig
from escala.schema.finetune import CONTEXT_TOKENS
from escala.schema.model import ModelConfig
from escala.schema.pretrained import with_model_of_start
from escala.schema.training import ResourcesConfig, StartConfig

Objective = Literal["bytes", "joules"]
MeasuredBits = Literal[2, 3, 4, 5, 6, 8]
MODEL_BITS, OUTPUT_BITS = (4, 8, 16), (8, 16)
"""Widths that can be served: of the blocks' matrices, and of the output product."""


class CompressConfig(Strict):
    """The `compress` workload: what each matrix holds, what it loses in fewer bits, and the cheapest widths within a
    loss budget (docs/theory E.2 to E.6).
    """

    start: StartConfig
    model: ModelConfig = ModelConfig()
    loss_budgets: list[float] = Field(
        [],
        description="nats a token above the model as it is; each is met, the smallest one's model is written. Empty: "
        "uniform widths are measured, and nothing is written",
    )
    objective: Objective = Field(
        "bytes",
        description="what is made least: bytes stored, or joules a token by the cluster's coefficients",
    )
    text: StoredPath | None = Field(None, description="a text file, all of it held out")
    data: DataConfig | None = Field(
        None,
        description="corpora, of which the held-out part is read; None without text: those of the run itself",
    )
    context_tokens: int | None = Field(
        None, gt=0, description="of a sequence; None: the model's most, but 1,024 at most"
    )
    tokens: int = Field(4096, gt=0, description="held-out tokens that sensitivities are measured on")
    check_tokens: int = Field(
        4096, gt=0, description="held-out tokens beside these, on which a budget must hold, too"
    )
    bits: list[MeasuredBits] = Field(
        [2, 3, 4, 5, 6, 8], min_length=1, description="widths whose loss is measured, matrix by matrix"
    )
    rank_shares: list[float] = Field(
        [0.03125, 0.0625, 0.125], description="low ranks that are measured, as shares of the full one"
    )
    group: Literal[32, 128] | None = Field(
        None,
        description="inputs that share a scale; None: 32 below 8 bits (128 are tried, too), at 8 all of an output",
    )
    method: Literal["hqq", "round"] = Field("hqq", description="how codes are chosen below 8 bits")
    keep: list[str] = Field([], description="patterns of matrices that stay as they are: blocks.0.*")
    rounds: int = Field(4, gt=0, le=100, description="assignments that are measured for a budget, at most")
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="before")
    @classmethod
    def _read_start(cls, data: Any) -> Any:
        return with_model_of_start(data)

    @field_validator("loss_budgets")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        if any(budget <= 0 for budget in value):
            raise ValueError("a budget is above 0: fewer bits lose something")
        if len(set(value)) < len(value):
            raise ValueError("a budget is given twice")
        return value

    @field_validator("rank_shares")
    @classmethod
    def _shares(cls, value: list[float]) -> list[float]:
        if any(not 0 < share < 1 for share in value):
            raise ValueError("a share of the rank is above 0 and below 1")
        return value

    @model_validator(mode="after")
    def _fits(self) -> CompressConfig:
        if self.resources.workers != 1:
            raise ValueError("one worker measures: leave resources.workers at 1")
        if self.text is not None and self.data is not None:
            raise ValueError("give text or data, not both")
        if self.context > self.model.max_context_tokens:
            raise ValueError(
                f"context_tokens {self.context} is longer than model.max_context_tokens "
                f"{self.model.max_context_tokens}"
            )
        return self

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        return self.context_tokens or min(CONTEXT_TOKENS, self.model.max_context_tokens)

    @property
    def small_group(self) -> int:
        """Inputs that share a scale below 8 bits."""
        return self.group or GROUP
