"""A judge: a chat model that is asked which of two answers is better."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from escala.schema.base import StoredPath
from escala.schema.compression import StoredWeights
from escala.schema.rewards.kind import KINDS, Needs, RewardKind

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


class JudgeModelConfig(StoredWeights):
    """A chat model that is asked which of two answers is better, and how."""

    model: StoredPath = Field(description="a safetensors directory or a .gguf file")
    question: Annotated[str, AfterValidator(_names_all)] = Field(
        QUESTION, description="what it is asked: a template of {prompt}, {first} and {second}"
    )
    batch_sequences: int = Field(8, gt=0, description="questions in one forward pass")


@KINDS.add
class JudgeRewardConfig(RewardKind):
    """A judge: the mean probability to win against the other responses, or against a reference."""

    kind: Literal["judge"]
    judge: JudgeModelConfig
    references: StoredPath | None = Field(
        None, description="JSONL of prompt, response; None: the other responses to the prompt in the call"
    )

    def contradiction(self, responses_per_prompt: int) -> str | None:
        """Without references it needs something to compare a response with."""
        if self.references is not None or responses_per_prompt >= 2:
            return None
        return "a judge without references compares a prompt's responses: set batch.responses_per_prompt to 2 or more"

    def needs(self) -> Needs:
        """The judge's model, and the references."""
        references = () if self.references is None else (self.references,)
        return Needs(models=(self.judge.model,), references=references)
