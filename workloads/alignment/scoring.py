"""Rewards of responses, all by one interface: a Python function (a verifiable reward), a reward model, a judge
(alignment/judge.py), and weighted sums of them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from escala.errors import DataError, SpecError
from workloads.alignment.judge import Judge, load_judge_model, read_references
from workloads.alignment.reward_model import RewardModel, answer_tokens, load_reward_model, pad_right
from workloads.config.rewards import FunctionRewardConfig, ModelRewardConfig, RewardConfig
from workloads.data.dialogues import Prompt
from workloads.generation.protocol import FP32_MAX, shown

if TYPE_CHECKING:
    from workloads.data.chat import ChatTokenizer


class Reward(Protocol):
    """Anything that scores responses."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        """The reward of each response to the prompt of the same index. Higher is better."""
        ...


class FunctionReward:
    """The user's function `package.module:function`, called as `function(prompts, responses)`.

    Raises SpecError, which names the function, where it can't be imported, raises, or does not return a finite
    number for each response.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._function = _import_function(name)

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        """What the function returns, as floats."""
        try:
            found = list(self._function(prompts, responses))
        except Exception as error:
            raise SpecError(
                f"The reward function {self.name} raised {type(error).__name__}: {error}",
                "Mend the function; the log has the traceback.",
            ) from error
        if len(found) != len(responses):
            raise SpecError(
                f"The reward function {self.name} returned {len(found)} rewards for {len(responses)} responses.",
                "Return one number for each response.",
            )
        return [self._number(index, value) for index, value in enumerate(found)]

    def _number(self, index: int, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= FP32_MAX:
            raise SpecError(
                f"The reward function {self.name} returned {shown(value)} for response {index}.",
                "Return a finite number for each response, in fp32's range.",
            )
        return number


def _import_function(name: str) -> Callable[[list[Prompt], list[str]], Sequence[float]]:
    module_name, _, attribute = name.partition(":")
    hint = "Name it as package.module:function, importable where the job runs."
    try:
        function: Any = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever the user's module raises
        raise SpecError(
            f"The reward function {name} can't be imported: {type(error).__name__}: {error}", hint
        ) from error
    if not callable(function):
        raise SpecError(f"The reward function {name} is no function but {type(function).__name__}.", hint)
    return function  # type: ignore[no-any-return]


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
                f"The {what} of response {index} is {value:g}: not a finite number in fp32.",
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
