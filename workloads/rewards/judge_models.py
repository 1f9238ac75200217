"""A judge prefers one of two responses (docs/theory C.8). Both orders are asked, since judges favour a place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from escala.contract.errors import DataError
from escala.schema.rewards.judge import QUESTION, JudgeModelConfig
from workloads.data.chat import ChatTokenizer
from workloads.data.dialogues import Prompt
from workloads.model.compression.stored import store_weights
from workloads.model.start import load_model, load_tokenizer
from workloads.model.transformer import Transformer
from workloads.rewards.reward_model import last_tokens, pad_right

JudgeQuestion = tuple[Prompt, str, str]  # prompt, first response, second response
FirstWins = Callable[[Sequence[JudgeQuestion]], Sequence[float]]
"""A judge's model: the probability, for each question, that the first response is the better one."""


@dataclass(frozen=True)
class Verdict:
    """What a judge thinks of two responses."""

    win: float  # probability that the first is the better one, mean of both orders
    place_bias: float  # mean of its probabilities of the place A, less 1/2: 0 where the order changes nothing


def compare(first_wins: FirstWins, questions: Sequence[JudgeQuestion]) -> list[Verdict]:
    """A verdict for each question; each is asked in both orders, in one call. `compare` of the swapped question gives
    1 - win.

    Raises DataError where the judge's model does not answer each question with a probability.
    """
    swapped = [(prompt, second, first) for prompt, first, second in questions]
    answers = [float(p) for p in first_wins([*questions, *swapped])]
    if len(answers) != 2 * len(questions):
        raise DataError(f"The judge gave {len(answers)} answers to {2 * len(questions)} questions.")
    wrong = next((p for p in answers if not 0 <= p <= 1), None)
    if wrong is not None:
        raise DataError(f"The judge answered {wrong}, which is no probability.", "Check the judge's model.")
    both = zip(answers[: len(questions)], answers[len(questions) :], strict=True)
    return [Verdict((p + 1 - q) / 2, (p + q - 1) / 2) for p, q in both]


def prompt_key(prompt: Prompt) -> str:
    """A text that is the same for the same prompt only."""
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def short(prompt: Prompt) -> str:
    """A prompt in a message."""
    text = prompt_key(prompt)
    return text if len(text) <= 80 else text[:77] + "..."


class LanguageModelJudge:
    """A chat model's probability of the answer A against B, normalised over the two (Zheng et al. 2023 ask likewise).

    It reads the logits after the question and samples nothing. Raises DataError where the tokenizer has no single
    token for each letter.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        question: str = QUESTION,
        batch_sequences: int = 8,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.question, self.batch_sequences = question, batch_sequences
        self._lead, self._letters = _answers(tokenizer)

    @torch.no_grad()
    def __call__(self, questions: Sequence[JudgeQuestion]) -> list[float]:
        """Raises DataError where a question is longer than the model's context."""
        rows = [self._tokens(*question) for question in questions]
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding in a batch
        device = next(self.model.parameters()).device
        answers = [0.0] * len(rows)
        for start in range(0, len(rows), self.batch_sequences):
            batch = by_length[start : start + self.batch_sequences]
            tokens_BT, lengths_B = pad_right([rows[i] for i in batch], self.tokenizer.end_of_text, device)
            for i, answer in zip(batch, self._first_wins(tokens_BT, lengths_B).tolist(), strict=True):
                answers[i] = answer
        return answers

    def _first_wins(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Probabilities_B of A."""
        logits_BV: Tensor = self.model(tokens_BT, at_BT=last_tokens(tokens_BT, lengths_B)).float()
        return logits_BV[:, self._letters].softmax(-1)[:, 0]

    def _tokens(self, prompt: Prompt, first: str, second: str) -> list[int]:
        text = self.question.format(prompt=_plain(prompt), first=first, second=second)
        ids = [*self.tokenizer.prompt([{"role": "user", "content": text}]), *self._lead]
        limit = self.model.config.max_context_tokens
        if len(ids) > limit:
            raise DataError(
                f"The judge's question about the prompt {short(prompt)} has {len(ids)} tokens, more than the "
                f"model's {limit}.",
                "Shorten prompts or responses, or take a judge of longer context.",
            )
        return ids


def _answers(tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    """The tokens between a question and its answer (a template's empty thoughts), and those of the answers A and B: as
    the function writes them that makes a sequence of prompt and answer, so with SentencePiece's blank. Where these are
    not one token for each letter, the bare letters, with nothing before them.

    Raises DataError where these are not single tokens either.
    """
    question = [{"role": "user", "content": "?"}]
    prompt = tokenizer.prompt(question)
    first, second = (tokenizer.sequence(question, letter)[0] for letter in "AB")
    if first[: len(prompt)] == second[: len(prompt)] == prompt:
        at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
        if at >= len(prompt) and first[at + 1 :] == second[at + 1 :]:
            return first[len(prompt) : at], [first[at], second[at]]
    letters = [tokenizer.encode(letter) for letter in "AB"]
    if any(len(ids) != 1 for ids in letters) or letters[0] == letters[1]:
        raise DataError("The judge's tokenizer has no token for the letter A, or none for B.")
    return [], [ids[0] for ids in letters]


def _plain(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def load_judge_model(config: JudgeModelConfig, device: torch.device | str) -> LanguageModelJudge:
    """The judge's model from disk, in its precision. Raises CheckpointError, DataError, or SpecError where its matrices
    can't be stored so.
    """
    model, tokenizer = load_model(Path(config.model)), load_tokenizer(Path(config.model))
    store_weights(model, config, tokenizer)
    return LanguageModelJudge(model.to(device), tokenizer, config.question, config.batch_sequences)
