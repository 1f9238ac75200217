"""The `reward` and `judge` deployments: responses scored, and compared."""

from __future__ import annotations

import asyncio
from typing import Any

from escala.schema.serve import ServeConfig
from workloads.serving.replica import begin, end


class RewardReplica:
    """The weighted sum of the configuration's rewards."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        import torch

        from workloads.rewards.scoring import build_reward

        self.config = ServeConfig.model_validate(config)
        await begin(self.config)
        self._reward = await asyncio.to_thread(build_reward, self.config.reward, _device(torch, self.config))
        self._turn = asyncio.Lock()  # a forward pass at a time: more threads than cores cost up to 10x

    async def score(self, prompts: list[Any], responses: list[str]) -> list[float]:
        """The reward of each response. Raises DataError or SpecError, as the rewards do."""
        async with self._turn:
            return await asyncio.to_thread(self._reward.score, prompts, responses)

    async def __del__(self) -> None:
        """Serve calls this once when the replica leaves."""
        await end(self.config)


class JudgeReplica:
    """A chat model that prefers one of two responses; both orders are asked."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        import torch

        from workloads.rewards.judge_models import load_judge_model

        self.config = ServeConfig.model_validate(config)
        await begin(self.config)
        if self.config.judge is None:
            raise ValueError("a judge was deployed without a judge section")
        self._first_wins = await asyncio.to_thread(
            load_judge_model, self.config.judge, _device(torch, self.config)
        )
        self._turn = asyncio.Lock()

    async def compare(self, prompts: list[Any], first: list[str], second: list[str]) -> list[float]:
        """The probability that each first response is the better one, mean of both orders. Raises DataError."""
        from workloads.rewards.judge_models import compare
        from workloads.rewards.scoring import finite

        questions = list(zip(prompts, first, second, strict=True))
        async with self._turn:
            verdicts = await asyncio.to_thread(compare, self._first_wins, questions)
        return finite([verdict.win for verdict in verdicts], "verdict")

    async def __del__(self) -> None:
        """Serve calls this once when the replica leaves."""
        await end(self.config)


def _device(torch: Any, config: ServeConfig) -> Any:
    """Not by `torch.cuda.is_available()`: a replica without a GPU of its own may see another's."""
    return torch.device("cuda" if config.replica_gpus else "cpu")
