"""The learning rate as a pure function of the step: nothing to store, nothing to restore."""

from __future__ import annotations

import math
from typing import Protocol

from escala.schema import OptimizerConfig, TrainingConfig


class Schedulable(Protocol):
    """What a workload's configuration must say about its length."""

    @property
    def training(self) -> TrainingConfig: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...


def learning_rate(step: int, config: Schedulable) -> float:
    """The learning rate of optimiser step `step` (0, 1, ...): linear warm-up, then the stated decay.

    Warm-up reaches the peak at step `warmup_steps`; its first step is peak / (warmup_steps + 1), never zero.
    cosine: Loshchilov & Hutter 2017; wsd (warm-up, stable, decay): Hu et al. 2024, with a linear decay over
    the last `decay_fraction` of all steps. Both end at `final_fraction` of the peak on the last step.
    """
    optimizer = config.training.optimizer
    warmup = config.warmup_steps
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / (warmup + 1)
    return optimizer.learning_rate * _decay(step, warmup, config.total_steps, optimizer)


def _decay(step: int, warmup: int, total: int, optimizer: OptimizerConfig) -> float:
    if optimizer.schedule == "constant":
        return 1.0
    last = total - 1
    start = optimizer.decay_start(total, warmup)
    done = min(1.0, max(0.0, (step - start) / max(1, last - start)))
    share = 0.5 * (1 + math.cos(math.pi * done)) if optimizer.schedule == "cosine" else 1 - done
    return optimizer.final_fraction + (1 - optimizer.final_fraction) * share
