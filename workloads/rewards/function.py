"""A reward that is a function of the user's."""

from __future__ import annotations

import torch

from escala.schema.rewards.function import FunctionRewardConfig
from workloads.data.dialogues import Prompt
from workloads.rewards.user_functions import UserFunction


class FunctionReward:
    """The user's function `package.module:function`, called as `function(prompts, responses)` in a process of its own.

    Raises as `UserFunction`.
    """

    def __init__(self, name: str, timeout_seconds: float = 600.0) -> None:
        self.name = name
        self._function = UserFunction(name, timeout_seconds)

    def score(
        self, prompts: list[Prompt], responses: list[str], timeout_seconds: float | None = None
    ) -> list[float]:
        """What the function returns, as floats, within `timeout_seconds` (None: the constructor's)."""
        return self._function(prompts, responses, timeout_seconds)


def make_reward(
    section: FunctionRewardConfig, device: torch.device, timeout_seconds: float
) -> FunctionReward:
    """See `workloads.rewards.scoring.make_reward`."""
    return FunctionReward(section.function, timeout_seconds)
