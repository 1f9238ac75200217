"""The `reward` and `judge` deployments: responses scored, and compared."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from workloads.config.serve import ServeConfig
from workloads.data.messages import plain_messages
from workloads.serving.loopback import keep_serve_on_loopback

Chat = Annotated[list[dict[str, Any]], AfterValidator(plain_messages)]


class ScoreRequest(BaseModel):
    """POST /score."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str | Chat]
    responses: list[str]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.prompts) != len(self.responses):
            raise ValueError(f"{len(self.prompts)} prompts, and {len(self.responses)} responses")
        return self


class CompareRequest(BaseModel):
    """POST /compare."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str | Chat]
    first: list[str]
    second: list[str]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if not len(self.prompts) == len(self.first) == len(self.second):
            raise ValueError(
                f"{len(self.prompts)} prompts, {len(self.first)} and {len(self.second)} responses"
            )
        return self


class RewardReplica:
    """The weighted sum of the configuration's rewards."""

    def __init__(self, config: dict[str, Any]) -> None:
        import torch

        from workloads.alignment.scoring import build_reward

        keep_serve_on_loopback()
        sections = ServeConfig.model_validate(config).reward
        self._reward = build_reward(sections, _device(torch))
        self._turn = asyncio.Lock()  # a forward pass at a time: more threads than cores cost up to 10x

    async def score(self, prompts: list[Any], responses: list[str]) -> list[float]:
        """The reward of each response. Raises DataError or SpecError, as the rewards do."""
        async with self._turn:
            return await asyncio.to_thread(self._reward.score, prompts, responses)


class JudgeReplica:
    """A chat model that prefers one of two responses; both orders are asked."""

    def __init__(self, config: dict[str, Any]) -> None:
        import torch

        from workloads.alignment.judge import load_judge_model

        keep_serve_on_loopback()
        section = ServeConfig.model_validate(config).judge
        if section is None:
            raise ValueError("a judge was deployed without a judge section")
        self._first_wins = load_judge_model(section, _device(torch))
        self._turn = asyncio.Lock()

    async def compare(self, prompts: list[Any], first: list[str], second: list[str]) -> list[float]:
        """The probability that each first response is the better one, mean of both orders. Raises DataError."""
        from workloads.alignment.judge import compare
        from workloads.alignment.scoring import finite

        questions = list(zip(prompts, first, second, strict=True))
        async with self._turn:
            verdicts = await asyncio.to_thread(compare, self._first_wins, questions)
        return finite([verdict.win for verdict in verdicts], "verdict")


def _device(torch: Any) -> Any:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
