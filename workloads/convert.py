"""Another kind of attention for an exact model: `python -m workloads.convert ATTEMPT.json`. Reads top to bottom.

The first steps fit each layer's attention to the exact one's output, both given the exact model's inputs of that layer.
The others train the loss (Zhang et al. 2024, Hedgehog; arXiv:2410.10254, LoLCATs; docs/theory A.10). Attention's
weights alone are trained. The gap to the exact model on the same held-out text is measured before the first step and
after.

Dimensions: L layers, B batch, T context, D model width, V vocabulary.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from escala.contract.records import AttemptSpec
from escala.schema import ConvertConfig, TokenizerConfig
from escala.schema.flops import step_flops_per_token, transfer_flops_per_token
from workloads.data.batches import Batch
from workloads.data.prepared import PreparedData
from workloads.data.shards import prepare as prepare_tokens
from workloads.model.conversion import attention_states, converted, fit_gains, train_attention_alone
from workloads.model.start import load_tokenizer, start_of
from workloads.model.transformer import Transformer
from workloads.pretrain import Pretraining, described
from workloads.training.entry import Entry, Prepared, WorkerInputs
from workloads.training.finetune import store_tokenizer
from workloads.training.loss import distillation_loss
from workloads.training.run import main
from workloads.training.step import Step
from workloads.training.task import Evaluation, StepSize

TRANSFER = "transfer_BT1"  # what a batch of the transfer calls its tokens
TRANSFER_LOSS = "attention_squared_error"  # mean over layers, tokens and channels


def prepare(spec: AttemptSpec, config: ConvertConfig) -> Prepared:
    """Corpus and token shards, by the start's own tokenizer where none is named. Raises DataError, CheckpointError."""
    data, root, start = config.data, Path(spec.data), config.start.path
    kept = None
    if data.tokenizer.path is None and start is not None:
        kept = store_tokenizer(load_tokenizer(Path(start)), root)
        own = TokenizerConfig(path=str(kept / "tokenizer.json"))
        data = data.model_copy(update={"tokenizer": own})
    found = prepare_tokens(data, root, config.context_tokens, partial(print, flush=True))
    prepared = described(found, config)
    return prepared if kept is None else Prepared(prepared.path, kept, prepared.fingerprints)


def make_step(inputs: WorkerInputs[ConvertConfig]) -> Step:
    """One worker's part of the steps."""
    from workloads.training.conversion_step import (
        ConversionStep,  # needs DeepSpeed, which the driver does without
    )

    task = Conversion(inputs.config, PreparedData.open(Path(inputs.prepared)))
    return ConversionStep(inputs.config, task)


class Conversion(Pretraining):
    """Attention's outputs, then the loss (training.task.Task). Units are tokens.

    Attributes:
        gaps: what the first evaluation found, kept over resumes: exact_loss_nats, gap_before_nats.
    """

    config: ConvertConfig
    exact: Transformer

    def __init__(self, config: ConvertConfig, data: PreparedData) -> None:
        super().__init__(config, data)
        self.gaps: dict[str, float] = {}

    def build(self) -> Transformer:
        """See Task. The exact model stays beside the trained one, whole on every rank; on the CPU in fp32 the two share
        all that is not trained.
        """
        exact = start_of(self.config, self.config.start)
        model = converted(exact, self.config.model)
        fit_gains(model, exact, self.batches.batch(0, 0, self.ranks, 0)[:1, :-1])
        train_attention_alone(model)
        model.activation_checkpointing = self.config.training.activation_checkpointing
        dtype = torch.bfloat16 if self.config.training.precision == "bf16" else torch.float32
        device = "cuda" if self.config.resources.gpus_per_worker else "cpu"
        self.exact = exact.to(device, dtype).requires_grad_(False).eval()
        return model

    def size(self, step: int) -> StepSize:
        """See Task."""
        config, tokens = self.config, self.config.step_tokens
        if step < config.transfer_steps:
            return StepSize(tokens, tokens, TRANSFER_LOSS, transfer_flops_per_token(config))
        flops = step_flops_per_token(config, config.epochs)
        return StepSize(tokens, tokens, flops_per_token=flops)

    def micro_batch(self, step: int, micro: int) -> Batch:
        """See Task."""
        batch = super().micro_batch(step, micro)
        return {TRANSFER: batch["tokens_BT1"]} if step < self.config.transfer_steps else batch

    def loss(self, engine: Any, batch: Batch) -> Tensor:
        """See Task."""
        if TRANSFER in batch:
            return transfer_error(engine, self.exact, batch[TRANSFER][:, :-1])
        tokens_BT1 = batch["tokens_BT1"]
        with torch.no_grad():
            exact_BTV = self.exact(tokens_BT1[:, :-1])
        logits_BTV = engine(tokens_BT1[:, :-1])
        targets_N = tokens_BT1[:, 1:].flatten()
        return distillation_loss(
            logits_BTV.flatten(0, 1), exact_BTV.flatten(0, 1), targets_N, self.config.kl_weight
        )

    def evaluate(self, engine: Any) -> Evaluation:
        """Held-out loss, and the gap to the exact model's: on the first call `gap_before_nats`, then
        `gap_after_nats`, too.
        """
        found = super().evaluate(engine)
        if not self.gaps:
            exact = super().evaluate(_Alone(self.exact, engine.device)).loss_nats
            self.gaps = {"exact_loss_nats": exact, "gap_before_nats": found.loss_nats - exact}
            return Evaluation(found.record, self.gaps)
        gap = found.loss_nats - self.gaps["exact_loss_nats"]
        return Evaluation(found.record, {**self.gaps, "gap_after_nats": gap})


def transfer_error(engine: Any, exact: Transformer, tokens_BT: Tensor) -> Tensor:
    """Squared difference of the two models' attention, both given the exact model's inputs of each layer: the mean over
    layers and channels, summed over tokens; fp32.
    """
    inputs_LBTD, wanted_LBTD = attention_states(exact, tokens_BT)
    found_LBTD = engine(tokens_BT, inputs_LBTD=inputs_LBTD)
    layers, *_, width = found_LBTD.shape
    error: Tensor = (found_LBTD.float() - wanted_LBTD.float()).square().sum() / (layers * width)
    return error


class _Alone:
    """A model without an engine, evaluated as one."""

    def __init__(self, model: Transformer, device: torch.device) -> None:
        self.model, self.device = model, device

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens_BT)
        return logits

    def eval(self) -> None:
        """It always is."""

    def train(self) -> None:
        """It never is."""


ENTRY = Entry(prepare, make_step)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
