"""A reward that is a trained model's score."""

from __future__ import annotations

from pathlib import Path

import torch

from escala.contract.errors import DataError, SpecError
from escala.schema.compression import BITS, StoredWeights
from escala.schema.rewards.model import ModelRewardConfig
from workloads.data.chat import ChatTokenizer
from workloads.data.dialogues import Prompt
from workloads.model.compression.layers import UNEMBEDDING
from workloads.model.compression.stored import store_weights
from workloads.rewards.reward_model import RewardModel, answer_tokens, load_reward_model, pad_right


class RewardModelScorer:
    """A reward model's scores, in batches, without gradients. It sets the model to evaluation."""

    def __init__(self, model: RewardModel, tokenizer: ChatTokenizer, batch_sequences: int = 16) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_sequences = batch_sequences

    @torch.no_grad()
    def score(
        self, prompts: list[Prompt], responses: list[str], timeout_seconds: float | None = None
    ) -> list[float]:
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


def store_trunk(model: RewardModel, stored: StoredWeights, tokenizer: ChatTokenizer) -> None:
    """Give a reward model's trunk its precision, in place: it has no output product, and the head stays as it is.
    Raises SpecError where its matrices can't be stored so.
    """
    if stored.precision in BITS:
        quantization = stored.quantization
        keep = quantization.model_copy(update={"keep": [*quantization.keep, UNEMBEDDING]})
        stored = stored.model_copy(update={"quantization": keep})
    store_weights(model.trunk, stored, tokenizer)
    model.head.to(model.trunk.embedding.weight.dtype)


def make_reward(
    section: ModelRewardConfig, device: torch.device, timeout_seconds: float
) -> RewardModelScorer:
    """See `workloads.rewards.scoring.make_reward`."""
    if section.model is None:
        raise SpecError(f"The reward model of job {section.job} has no path.", "Submit it by `escala`.")
    model, tokenizer = load_reward_model(Path(section.model))
    store_trunk(model, section, tokenizer)
    return RewardModelScorer(model.to(device), tokenizer, section.batch_sequences)
