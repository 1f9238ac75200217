"""The step of pretraining, SFT, reward models and DPO: the gradient of a task's mean loss, and an update by it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from escala.contract.errors import Diverged
from escala.schema import TrainedConfig
from escala.schema.flops import training_flops_per_token
from escala.storage.checkpoints import Checkpoint
from workloads.training import zero
from workloads.training.experts import Routers
from workloads.training.far_part import with_far_part
from workloads.training.gradient import accumulate
from workloads.training.report import Reporter
from workloads.training.schedule import learning_rate
from workloads.training.step import Counters, StepResult
from workloads.training.task import TRAIN_LOSS, Evaluation, StepSize, Task, on_device
from workloads.training.traffic import Traffic


class SupervisedStep:
    """One rank's part of a task's steps (training.step.Step)."""

    engine: Any
    size: StepSize  # of the step that was begun

    def __init__(self, config: TrainedConfig, task: Task) -> None:
        self.config, self.task = config, task
        self.ranks = torch.distributed.get_world_size()
        self.micro_batch = config.micro_batch_sequences
        self.micro_steps = config.training.batch_sequences // (self.ranks * self.micro_batch)
        self.flops_per_token = training_flops_per_token(config)
        self.metrics: dict[str, float | None] = {}  # of the last step

    def build(self) -> None:
        """See Step."""
        model = self.task.build()
        self.routers = Routers(model, self.config.total_steps)
        self.engine = zero.make_engine(model, self.config.training, self.micro_batch, self.micro_steps)
        self.traffic = Traffic()

    def other_engines(self) -> dict[str, Any]:
        """See Step: none."""
        return {}

    def state(self) -> dict[str, Any]:
        """See Step: nothing else."""
        return {}

    def restore(self, found: Checkpoint) -> None:
        """See Step: nothing else."""

    def begin(self, step: int) -> int:
        """See Step."""
        self.size = self.task.size(step)
        return self.size.tokens

    def run(self, count: Counters) -> StepResult:
        """See Step."""
        step, config, sent_before = count.step, self.config, self._sent_bytes()
        loss = self._mean_loss(step)
        if not math.isfinite(loss):
            raise diverged(count, f"the loss is {loss}")
        rate = learning_rate(step, config)
        zero.set_learning_rate(self.engine, rate)
        norm = zero.optimizer_step(self.engine, config.training)
        if not math.isfinite(norm):
            raise diverged(count, "the gradient norm is not finite")
        name = self.size.loss_name
        self.metrics = {name: loss, "learning_rate": rate, "gradient_norm": norm}
        compared = loss if name == TRAIN_LOSS else None
        flops = self.size.flops_per_token or self.flops_per_token
        return StepResult(self.size.tokens, flops, compared, self._sent_bytes() - sent_before)

    def _mean_loss(self, step: int) -> float:
        """The mean loss over the units of the step on all ranks, in nats; its gradient is in the engine."""
        device = self.engine.device
        micro_batches = (
            on_device(self.task.micro_batch(step, micro), device) for micro in range(self.micro_steps)
        )
        self.routers.begin_step(step)
        auxiliary = self.routers.loss if self.routers.layers else None
        loss_sum: Tensor = accumulate(
            self.engine, micro_batches, self.micro_steps, self.size.units, self.task.loss, auxiliary
        )
        total = loss_sum.to(torch.float64)
        if self.ranks > 1:
            torch.distributed.all_reduce(total)
        return float(total) / self.size.units

    def _sent_bytes(self) -> float:
        return self.traffic.sent_bytes + self.routers.sent_bytes

    def report(self, step: int, is_logged: bool, reporter: Reporter | None) -> None:
        """See Step."""
        if not is_logged:
            return
        self.routers.report(step, reporter)
        if reporter is not None:
            reporter.metrics(step, self.metrics)

    def evaluate(self) -> Evaluation:
        """See Step. A model with a far part is evaluated without it, too."""
        return with_far_part(
            self.task.evaluate(self.engine),
            self.engine.module,
            self.config.model,
            self.config.context_tokens,
            lambda: self.task.evaluate(self.engine),
        )

    def close(self) -> None:
        """See Step: nothing runs in the background."""


def diverged(count: Counters, what: str) -> Diverged:
    """The error of the step after `count`."""
    last = "none" if count.last_loss is None else f"{count.last_loss:.4f} at step {count.step}"
    return Diverged(
        f"training diverged at step {count.step + 1}: {what} (last finite loss: {last})",
        "lower training.optimizer.learning_rate, or warm up longer; the last checkpoint is from before",
    )
