"""The `judge` workload."""

from __future__ import annotations

from pydantic import Field

from escala.schema.base import StoredPath, Strict
from escala.schema.rewards.judge import JudgeModelConfig
from escala.schema.training import ResourcesConfig


class JudgeConfig(Strict):
    """The `judge` workload: preferences among given responses, by a chat model (RLAIF data)."""

    responses: StoredPath = Field(description="JSONL of prompt, responses (two or more)")
    to: StoredPath = Field(
        description="the JSONL file of preferences to write; one that is there is replaced"
    )
    judge: JudgeModelConfig
    minimum_margin: float = Field(
        0.0, ge=0, lt=1, description="drop a pair whose win probabilities differ by less; equals always go"
    )
    resources: ResourcesConfig = ResourcesConfig()
