"""What supervised training (training.supervised) is told: its model, its batches, its loss, its evaluation.

One contract for all: a step's gradient is that of the mean loss over the step's units (tokens, answers' tokens, pairs),
however ranks and micro-batches cut it. So a task gives sums, and how many units the whole step has, which every rank
must know without asking the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workloads.data.batches import Batch

TRAIN_LOSS = "train_loss_nats"


@dataclass(frozen=True)
class StepSize:
    """A whole step's size, over all ranks and micro-batches."""

    units: float  # what the summed loss is divided by
    tokens: int  # that the model reads, padding left out
    loss_name: str = TRAIN_LOSS  # the metric of the mean loss; another name where it is not in nats
    flops_per_token: float | None = None  # None: the run's mean


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: fields of RunRecord (`held_out_loss_nats`, ...), and other measures by name."""

    record: dict[str, float]
    measures: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # artifacts of the run, by path
    notices: dict[str, str] = field(default_factory=dict)  # by tag: what is said of the run if it ends here
    is_reported: bool = False  # its measures were reported with the step that made them

    @property
    def loss_nats(self) -> float:
        """The held-out loss."""
        return self.record["held_out_loss_nats"]

    def __str__(self) -> str:
        names = {**self.record, **self.measures}
        return ", ".join(f"{name} {value:.4f}" for name, value in names.items())


class Task(Protocol):
    """One rank's view of a workload. Batches are pure functions of the step, so that a resumed run repeats nothing."""

    def build(self) -> nn.Module:
        """The module whose parameters are trained, the same on every rank; drawn from torch's global generator."""
        ...

    def size(self, step: int) -> StepSize:
        """The size of optimiser step `step`."""
        ...

    def micro_batch(self, step: int, micro: int) -> Batch:
        """This rank's micro-batch, on the CPU."""
        ...

    def loss(self, engine: Any, batch: Batch) -> Tensor:
        """The sum of the losses of a micro-batch's units, a scalar; `engine` is called as the built module."""
        ...

    def evaluate(self, engine: Any) -> Evaluation:
        """A collective call; the same result on every rank."""
        ...


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
