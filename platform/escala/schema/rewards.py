"""What rewards a response: sections that a workload's `rewards` list holds."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from escala.schema.base import StoredPath, Strict

QUESTION = """Which answer to the prompt is better?

Prompt: {prompt}

Answer A: {first}

Answer B: {second}

Reply with one letter, A or B."""


def _names_all(template: str) -> str:
    try:
        names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the question is no template: {error}; double the braces that stay") from error
    if names != {"prompt", "first", "second"}:
        raise ValueError("the question must hold {prompt}, {first} and {second}, and nothing else in braces")
    return template


class JudgeModelConfig(Strict):
    """A chat model that is asked which of two answers is better, and how."""

    model: StoredPath = Field(description="a safetensors directory or a .gguf file")
    question: Annotated[str, AfterValidator(_names_all)] = QUESTION
    batch_sequences: int = Field(8, gt=0, description="questions in one forward pass")


class _Weighted(Strict):
    weight: float = Field(
        1.0, allow_inf_nan=False, description="of this reward in the sum; of a function, 0: only measured"
    )


class FunctionRewardConfig(_Weighted):
    """A verifiable reward: `function(prompts, responses)` returns a number for each response."""

    kind: Literal["function"]
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="package.module:function")


class ModelRewardConfig(_Weighted):
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


class JudgeRewardConfig(_Weighted):
    """A judge: the mean probability to win against the other responses, or against a reference."""

    kind: Literal["judge"]
    judge: JudgeModelConfig
    references: StoredPath | None = Field(
        None, description="JSONL of prompt, response; None: the other responses to the prompt in the call"
    )


RewardConfig = Annotated[
    FunctionRewardConfig | ModelRewardConfig | JudgeRewardConfig, Field(discriminator="kind")
]
