"""A reward that is a trained model."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from escala.schema.base import StoredPath
from escala.schema.compression import StoredWeights
from escala.schema.rewards.kind import KINDS, Needs, RewardKind


@KINDS.add
class ModelRewardConfig(RewardKind, StoredWeights):
    """A trained reward model."""

    kind: Literal["model"]
    model: StoredPath | None = Field(None, description="the directory that the reward workload saved")
    job: str | None = Field(
        None, description="a reward job's id or name; `submit` writes its checkpoints into model"
    )
    batch_sequences: int = Field(16, gt=0, description="responses in one forward pass")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.model is None and self.job is None:
            raise ValueError("give model or job")
        return self

    def needs(self) -> Needs:
        """The model; one that a job has still to write, the queue waits for."""
        return Needs() if self.model is None or self.job else Needs(models=(self.model,))
