"""Rewards of responses, all by one interface: a Python function (a verifiable reward), a reward model, a judge
(alignment/judge.py), and weighted sums of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from escala.contract.errors import DataError, SpecError
from escala.schema.rewards import FunctionRewardConfig, ModelRewardConfig, RewardConfig
from workloads.data.dialogues import Prompt
from workloads.generation.protocol import FP32_MAX
from workloads.rewards.functions import UserFunction
from workloads.rewards.judge_models import Judge, load_judge_model, read_references
from workloads.rewards.reward_model import RewardModel, answer_tokens, load_reward_model, pad_right

if TYPE_CHECKING:
    from workloads.data.chat import ChatTokenizer


class Reward(Protocol):
    """Anything that scores responses."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        """The reward of each response to the prompt of the same index. Higher is better."""
        ...


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


class WeightedSum:
    """Sum of weight * reward over (weight, reward). Raises SpecError where there is none."""

    def __init__(self, terms: Sequence[tuple[float, Reward]]) -> None:
        if not terms:
            raise SpecError("A sum of rewards needs one at least.", "Name a reward.")
        self.terms = list(terms)

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        """The sums."""
        return weighted_sums([(weight, term.score(prompts, responses)) for weight, term in self.terms])


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


class RewardModelScorer:
    """A reward model's scores, in batches, without gradients. It sets the model to evaluation."""

    def __init__(self, model: RewardModel, tokenizer: ChatTokenizer, batch_sequences: int = 16) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_sequences = batch_sequences

    @torch.no_grad()
    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        """Raises DataError where a prompt with its response is longer than the model's context."""
        pairs = zip(prompts, responses, strict=True)
        rows = [answer_tokens(self.tokenizer, prompt, response) for prompt, response in pairs]
        longest = max(map(len, rows), default=0)
        limit = self.model.trunk.config.max_context_tokens
        if longest > limit:
            raise DataError(
                f"A prompt with its response has {longest} tokens, more than the reward model's {limit}.",
                "Shorten prompts or responses, or take a reward model of longer context.",
            )
        device = next(self.model.parameters()).device
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding in a batch
        scores = [0.0] * len(rows)
        for start in range(0, len(rows), self.batch_sequences):
            batch = by_length[start : start + self.batch_sequences]
            tokens_BT, lengths_B = pad_right([rows[i] for i in batch], self.tokenizer.end_of_text, device)
            for i, value in zip(batch, self.model(tokens_BT, lengths_B).tolist(), strict=True):
                scores[i] = value
        return scores


def build_reward(sections: Sequence[RewardConfig], device: torch.device) -> WeightedSum:
    """The weighted sum that a spec's `rewards` describe; models are loaded onto `device`."""
    return WeightedSum([(section.weight, _build(section, device)) for section in sections])


def _build(section: RewardConfig, device: torch.device) -> Reward:
    if isinstance(section, FunctionRewardConfig):
        return FunctionReward(section.function)
    if isinstance(section, ModelRewardConfig):
        model, tokenizer = load_reward_model(Path(section.model))
        return RewardModelScorer(model.to(device), tokenizer, section.batch_sequences)
    references = None if section.references is None else read_references(Path(section.references))
    return Judge(load_judge_model(section.judge, device), references)
