"""Reward models: `python -m workloads.reward ATTEMPT.json`. Bradley-Terry on pairs (docs/theory C.7).

The score is read on the last token of prompt and response, their end of text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from escala.contract.records import AttemptSpec
from escala.schema import RewardTrainingConfig
from workloads.alignment.calibration import accuracy, calibration_curve, expected_calibration_error
from workloads.alignment.losses import bradley_terry
from workloads.data.batches import Batch
from workloads.data.chat import ChatTokenizer
from workloads.data.dialogues import Prompt
from workloads.rewards.reward_model import RewardModel, answer_tokens, pad_right
from workloads.training import finetune
from workloads.training.entry import Entry, Prepared, WorkerInputs, supervised
from workloads.training.evaluate import held_out_rows
from workloads.training.run import main
from workloads.training.task import Evaluation, on_device


def prepare(spec: AttemptSpec, config: RewardTrainingConfig) -> Prepared:
    """Pairs, tokenised. Raises DataError."""

    def tokens(tokenizer: ChatTokenizer, prompt: Prompt, response: str) -> finetune.Tokenised:
        ids = answer_tokens(tokenizer, prompt, response)
        return ids, [True] * len(ids)

    return finetune.prepare_pairs(spec, config, tokens)


def make_task(inputs: WorkerInputs[RewardTrainingConfig]) -> RewardModelling:
    """The task of one worker."""
    return RewardModelling(inputs)


BINS = 10  # of probability, in the calibration curve


class RewardModelling(finetune.PairBatches[RewardTrainingConfig]):
    """-log sigmoid of the difference of two scores (training.task.Task)."""

    def build(self) -> RewardModel:
        """See Task: the start, its deltas where there are any, and a head that scores everything 0."""
        return RewardModel(finetune.build_model(self.config))

    def batch(self, pairs: finetune.PairedSequences, chosen: Sequence[int]) -> Batch:
        """Whole sequences, padded on the right, and the pairs' margins."""
        rows = [pairs.sequences.slice(row)[0].tolist() for row in pairs.rows(chosen)]
        tokens_BT, lengths_B = pad_right(rows, 0, torch.device("cpu"))
        margins_B = torch.tensor([pairs.margins[pair] for pair in chosen], dtype=torch.float32)
        return {"tokens_BT": tokens_BT, "lengths_B": lengths_B, "margins_B": margins_B}

    def loss(self, engine: Any, batch: Batch) -> Tensor:
        """See Task."""
        chosen_B, rejected_B = self.scores(engine, batch)
        return bradley_terry(chosen_B, rejected_B, batch["margins_B"]) * len(chosen_B)

    def scores(self, engine: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of chosen and rejected, each (B,), fp32."""
        return finetune.halves(engine(batch["tokens_BT"], batch["lengths_B"]))

    def evaluate(self, engine: Any) -> Evaluation:
        """Held-out loss per pair, accuracy, margin, and whether the model's probabilities are right.

        A pair is counted in both orders, (p, 1) and (1 - p, 0), so that calibration says more than accuracy.
        """

        def rows(indices: list[int]) -> Tensor:
            batch = on_device(self.batch(self.held_out, indices), engine.device)
            return torch.stack([*self.scores(engine, batch), batch["margins_B"]], dim=1)

        size = self.config.micro_batch_sequences
        chosen_B, rejected_B, margins_B = held_out_rows(engine, len(self.held_out), size, rows).unbind(1)
        p = torch.sigmoid(chosen_B - rejected_B)
        curve = calibration_curve(
            torch.cat([p, 1 - p]), torch.cat([torch.ones_like(p), torch.zeros_like(p)]), BINS
        )
        measures = {
            "held_out_accuracy": float(accuracy(chosen_B, rejected_B)),
            "held_out_reward_margin": float((chosen_B - rejected_B).mean()),
            "calibration_error": expected_calibration_error(curve),
        }
        loss = float(bradley_terry(chosen_B, rejected_B, margins_B))
        texts = {"calibration.json": json.dumps([asdict(entry) for entry in curve], indent=1)}
        return Evaluation({"held_out_loss_nats": loss}, measures, texts)


ENTRY = Entry(prepare, supervised(make_task))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
