"""Pretraining: `python -m workloads.pretrain ATTEMPT.json`. Reads top to bottom.

The driver makes the data ready (`prepare`); each worker trains the task (`make_task`) in training/loop.py.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from escala.contract.records import AttemptSpec
from escala.schema import PretrainConfig
from escala.schema.pretrain import MASS_IN_WINDOW, WINDOW_OF_MASS
from workloads.data.batches import Batch, Batches
from workloads.data.prepared import PreparedData, check
from workloads.data.shards import prepare as prepare_tokens
from workloads.model.attention.mass import measured_mass
from workloads.model.transformer import Transformer
from workloads.training.entry import Entry, Prepared, WorkerInputs, supervised
from workloads.training.evaluate import bits_per_byte, held_out_sums
from workloads.training.experts import expert_group
from workloads.training.loss import next_token_loss, token_loss
from workloads.training.recall import ARTIFACT, RecallTable
from workloads.training.run import main
from workloads.training.task import Evaluation, StepSize


def prepare(spec: AttemptSpec, config: PretrainConfig) -> Prepared:
    """Corpus, tokenizer and token shards, from the store where they are there. Raises DataError."""
    report = partial(print, flush=True)
    return described(prepare_tokens(config.data, Path(spec.data), config.context_tokens, report), config)


def described(data: PreparedData, config: PretrainConfig) -> Prepared:
    """Prepared data, checked against the configuration. Raises DataError."""
    check(data, config)
    fingerprints = {
        "corpus": data.corpus_fingerprint,
        "tokenizer": data.tokenizer_fingerprint,
        "evaluation": data.evaluation_fingerprint,
    }
    return Prepared(str(data.path), data.tokenizer_path, fingerprints)


def make_task(inputs: WorkerInputs[PretrainConfig]) -> Pretraining:
    """The task of one worker."""
    return Pretraining(inputs.config, PreparedData.open(Path(inputs.prepared)))


class Pretraining:
    """Next-token loss on windows of the corpus (training.task.Task). Units are tokens."""

    def __init__(self, config: PretrainConfig, data: PreparedData) -> None:
        self.config, self.data = config, data
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        training = config.training
        self.batches = Batches(
            data, config.context_tokens, training.batch_sequences, training.seed, config.micro_batch_sequences
        )
        self.held_out_NT1 = data.held_out(config.context_tokens, training.evaluation_tokens)
        recall = config.data.recall
        self.recall = None if recall is None else RecallTable(recall, self.held_out_NT1)

    def build(self) -> Transformer:
        """See Task."""
        model = Transformer(self.config.model, expert_group(self.config.model.moe))
        model.activation_checkpointing = self.config.training.activation_checkpointing
        return model

    def size(self, step: int) -> StepSize:
        """See Task: every step has the same."""
        return StepSize(self.config.step_tokens, self.config.step_tokens)

    def micro_batch(self, step: int, micro: int) -> Batch:
        """See Task."""
        return {"tokens_BT1": self.batches.batch(step, self.rank, self.ranks, micro)}

    def loss(self, engine: Any, batch: Batch) -> Tensor:
        """See Task."""
        return next_token_loss(engine, batch["tokens_BT1"])

    def evaluate(self, engine: Any) -> Evaluation:
        """Mean loss over all held-out windows, the same tokens at every number of ranks; with
        `measure_attention_window`, the share of attention mass in it, over the same tokens.
        """
        recall, window = self.recall, self.config.measure_attention_window
        model = None if window is None else engine.module

        def sums(indices: list[int]) -> Tensor:
            tokens_BT1 = self.held_out_NT1[indices].to(engine.device)
            with measured_mass(model, window) as mass_2:
                logits_BTV, targets_BT = engine(tokens_BT1[:, :-1]), tokens_BT1[:, 1:]
            found = [torch.stack(token_loss(logits_BTV, targets_BT)).double(), mass_2.to(engine.device)]
            if recall is not None:
                found.append(recall.sums(logits_BTV, targets_BT, indices))
            return torch.cat(found)

        total, tokens, mass, queries, *groups = held_out_sums(
            engine, len(self.held_out_NT1), self.config.micro_batch_sequences, sums
        )
        loss = total / tokens
        measures = {} if window is None else {MASS_IN_WINDOW: mass / queries, WINDOW_OF_MASS: float(window)}
        if recall is not None:  # no bits per byte: its tokens are of no text
            recalled, table = recall.measures(groups)
            return Evaluation({"held_out_loss_nats": loss}, {**measures, **recalled}, {ARTIFACT: table})
        per_byte = bits_per_byte(loss, self.data.held_out_bytes_per_token)
        return Evaluation({"held_out_loss_nats": loss, "held_out_bits_per_byte": per_byte}, measures)


ENTRY = Entry(prepare, supervised(make_task))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
