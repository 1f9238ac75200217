"""Rewards of responses, all by one interface, and weighted sums of them. What computes each kind is a module of its
own, found by the kind's name; what the control plane must know of it stands in `escala.schema.rewards.KIND`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Protocol

import torch

from escala.contract.errors import DataError, SpecError
from escala.schema.rewards import RewardKind
from workloads.data.dialogues import Prompt
from workloads.generation.protocol import FP32_MAX

CPU = torch.device("cpu")


class Reward(Protocol):
    """Anything that scores responses."""

    def score(
        self, prompts: list[Prompt], responses: list[str], timeout_seconds: float | None = None
    ) -> list[float]:
        """The reward of each response to the prompt of the same index. Higher is better.

        Args:
            timeout_seconds: of this call, for kinds that workers compute; None: the constructor's. The others' calls
                are bounded by who asks their deployment.
        """
        ...


class WeightedSum:
    """Sum of weight * reward over (weight, reward). Raises SpecError where there is none."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        if not terms:
            raise SpecError("A sum of rewards needs one at least.", "Name a reward.")
        self.terms = list(terms)

    def score(
        self, prompts: list[Prompt], responses: list[str], timeout_seconds: float | None = None
    ) -> list[float]:
        """The sums."""
        columns = [(w, term.score(prompts, responses, timeout_seconds)) for w, term in self.terms]
        return weighted_sums(columns)


def weighted_sums(columns: Sequence[tuple[float, Sequence[float]]]) -> list[float]:
    """Of each response: the sum of weight * reward over (weight, rewards of all responses). Raises DataError for one
    that is not finite in fp32, in which it is learnt from.
    """
    rows = zip(*([weight * reward for reward in rewards] for weight, rewards in columns), strict=True)
    return finite([_sum(row) for row in rows], "reward")


def _sum(row: Sequence[float]) -> float:
    try:
        return math.fsum(row)
    except (OverflowError, ValueError):  # beyond fp64, or infinities of both signs
        return math.nan


def finite(values: list[float], what: str) -> list[float]:
    """`values`, each a finite number in fp32. Raises DataError, which names the first that is not."""
    for index, value in enumerate(values):
        if not abs(value) <= FP32_MAX:
            raise DataError(
                f"The {what} of response {index + 1} is {value:g}: not a finite number in fp32.",
                "Check the models and functions that give it, and the rewards' weights.",
            )
    return values


def build_reward(sections: Sequence[RewardKind], device: torch.device) -> WeightedSum:
    """The weighted sum that a spec's `rewards` describe; models are loaded onto `device`."""
    return WeightedSum([(section.weight, make_reward(section, device)) for section in sections])


def make_reward(
    section: RewardKind,
    device: torch.device = CPU,
    timeout_seconds: float = 600.0,
) -> Reward:
    """What computes a section of `rewards`: `make_reward` of module `workloads.rewards.KIND`.

    Args:
        device: its models are loaded onto it.
        timeout_seconds: of a call, for kinds that workers compute.
    """
    module = importlib.import_module(f"workloads.rewards.{section.kind}")
    reward: Reward = module.make_reward(section, device, timeout_seconds)
    return reward
