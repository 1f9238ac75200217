"""A judge's reward: the mean win probability against the other responses to the prompt in the call, or against a
reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import torch

from escala.contract.errors import DataError
from escala.schema.rewards.judge import JudgeRewardConfig
from workloads.data.dialogues import Prompt, prompt_of, read_lines, text_of
from workloads.rewards.judge_models import FirstWins, compare, load_judge_model, prompt_key, short


class Judge:
    """Rewards in [0, 1]: mean win probabilities.

    Args:
        first_wins: the judge's model.
        references: by `prompt_key`, the response to compare with; None: the other responses to the prompt.
    """

    def __init__(self, first_wins: FirstWins, references: Mapping[str, str] | None = None) -> None:
        self._first_wins, self._references = first_wins, references

    def score(
        self, prompts: list[Prompt], responses: list[str], timeout_seconds: float | None = None
    ) -> list[float]:
        """Raises DataError where a prompt has neither a second response in the call nor a reference."""
        if self._references is not None:
            pairs = zip(prompts, responses, strict=True)
            questions = [(prompt, response, self._reference(prompt)) for prompt, response in pairs]
            return [verdict.win for verdict in compare(self._first_wins, questions)]
        matches = list(_matches(prompts, responses))
        verdicts = compare(self._first_wins, [(prompts[i], responses[i], responses[j]) for i, j in matches])
        wins: list[list[float]] = [[] for _ in responses]
        for (i, j), verdict in zip(matches, verdicts, strict=True):
            wins[i].append(verdict.win)
            wins[j].append(1 - verdict.win)
        return [math.fsum(found) / len(found) for found in wins]

    def _reference(self, prompt: Prompt) -> str:
        reference = (self._references or {}).get(prompt_key(prompt))
        if reference is None:
            raise DataError(
                f"The judge has no reference response to the prompt {short(prompt)}.",
                "Add it to the file of references, or leave the file out to compare responses with each other.",
            )
        return reference


def _matches(prompts: list[Prompt], responses: list[str]) -> list[tuple[int, int]]:
    """Index pairs of responses to one prompt. Raises DataError where a prompt has a single one."""
    groups: dict[str, list[int]] = {}
    for index, (prompt, _) in enumerate(zip(prompts, responses, strict=True)):
        groups.setdefault(prompt_key(prompt), []).append(index)
    for group in groups.values():
        if len(group) < 2:
            raise DataError(
                f"The judge got one response to the prompt {short(prompts[group[0]])}: there is nothing to "
                "compare it with.",
                "Sample two or more responses to each prompt, or give the judge references.",
            )
    return [match for group in groups.values() for match in combinations(group, 2)]


def read_references(path: Path) -> dict[str, str]:
    """Reference responses by `prompt_key`, from a JSONL file of `prompt` and `response`.

    Raises DataError, with file and line, also where a prompt has two different ones.
    """
    references: dict[str, str] = {}
    for where, record in read_lines(path):
        key, response = prompt_key(prompt_of(where, record)), text_of(where, record, "response")
        if references.setdefault(key, response) != response:
            raise DataError(f"{where} is a second reference response to its prompt.", "Keep one of them.")
    return references


def make_reward(section: JudgeRewardConfig, device: torch.device, timeout_seconds: float) -> Judge:
    """See `workloads.rewards.scoring.make_reward`."""
    references = None if section.references is None else read_references(Path(section.references))
    return Judge(load_judge_model(section.judge, device), references)
