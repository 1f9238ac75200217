"""Supervised fine-tuning: `python -m workloads.sft ATTEMPT.json`. Next-token loss on the answers alone.

Dialogues are packed into rows of one context; none sees another, and each has its own positions, so packed and
unpacked batches give equal losses.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from escala.contract.records import AttemptSpec
from escala.schema import SftConfig
from workloads.data.batches import Batch
from workloads.data.cache import check_directory
from workloads.data.chat import ChatTokenizer
from workloads.data.dialogues import Chat, Dialogue, read_dialogues
from workloads.data.examples import Draws, Sequences, pack, row_batch
from workloads.model.transformer import Transformer
from workloads.training import finetune
from workloads.training.entry import Entry, Prepared, WorkerInputs, supervised
from workloads.training.evaluate import held_out_sums
from workloads.training.loss import token_loss
from workloads.training.run import main
from workloads.training.task import Evaluation, StepSize, on_device


def prepare(spec: AttemptSpec, config: SftConfig) -> Prepared:
    """Dialogues, tokenised, with their answers marked. Raises DataError."""

    def tokenise(tokenizer: ChatTokenizer, one: Dialogue) -> list[finetune.Tokenised]:
        if isinstance(one, Chat):
            return [tokenizer.conversation(one.messages, one.untrained)]
        return [finetune.answered(tokenizer, one.prompt, one.completion)]

    return finetune.prepare(spec, config, read_dialogues, tokenise)


def make_task(inputs: WorkerInputs[SftConfig]) -> FineTuning:
    """The task of one worker."""
    directory = Path(inputs.prepared)
    check_directory(directory)
    train, held_out = (Sequences.load(directory / f"{split}.safetensors") for split in ("train", "held_out"))
    return FineTuning(inputs.config, train, held_out)


class FineTuning:
    """Loss on answers (training.task.Task). Units are the answers' tokens; a batch counts rows."""

    def __init__(self, config: SftConfig, train: Sequences, held_out: Sequences) -> None:
        self.config, self.train, self.held_out = config, train, held_out
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.rows, self.held_out_rows = (self._rows(side) for side in (train, held_out))
        answers, read = train.answer_counts(), train.lengths - 1
        self.row_answers = np.array([answers[row].sum() for row in self.rows])
        self.row_tokens = np.array([read[row].sum() for row in self.rows])
        training = config.training
        self.draws = Draws(len(self.rows), training.batch_sequences, training.seed)
        if self.rank == 0:
            epochs = config.total_steps * training.batch_sequences / len(self.rows)
            print(
                f"{len(train)} dialogues in {len(self.rows)} rows; the run reads them {epochs:.2f} times",
                flush=True,
            )

    def _rows(self, sequences: Sequences) -> list[list[int]]:
        if not self.config.data.packing:
            return [[number] for number in range(len(sequences))]
        return pack(sequences.lengths.tolist(), self.config.context_tokens)

    def build(self) -> Transformer:
        """See Task."""
        return finetune.build_model(self.config)

    def size(self, step: int) -> StepSize:
        """See Task."""
        rows = self.draws.step(step)
        return StepSize(float(self.row_answers[rows].sum()), int(self.row_tokens[rows].sum()))

    def micro_batch(self, step: int, micro: int) -> Batch:
        """See Task."""
        size = self.config.micro_batch_sequences
        chosen = self.draws.micro_batch(step, micro, self.rank, self.ranks, size)
        return row_batch(self.train, [self.rows[row] for row in chosen])

    def loss(self, engine: Any, batch: Batch) -> Tensor:
        """See Task."""
        return answer_loss(engine, batch)

    def evaluate(self, engine: Any) -> Evaluation:
        """Mean loss over all held-out answers' tokens."""

        def sums(indices: list[int]) -> Tensor:
            batch = on_device(
                row_batch(self.held_out, [self.held_out_rows[i] for i in indices]), engine.device
            )
            return torch.stack([answer_loss(engine, batch), batch["answers_BT"].sum()])

        size = self.config.micro_batch_sequences
        total, tokens = held_out_sums(engine, len(self.held_out_rows), size, sums)
        return Evaluation({"held_out_loss_nats": total / tokens})


def answer_loss(engine: Any, batch: Batch) -> Tensor:
    """The summed loss of the answers' tokens, in nats. Logits are made for them alone."""
    answers_BT = batch["answers_BT"]
    logits_NV = engine(batch["tokens_BT"], batch.get("positions_BT"), batch.get("documents_BT"), answers_BT)
    total, _ = token_loss(logits_NV[None], batch["targets_BT"][answers_BT][None])
    return total


ENTRY = Entry(prepare, supervised(make_task))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
