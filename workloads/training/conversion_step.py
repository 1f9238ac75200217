"""The step of a conversion: a supervised one that keeps what its first evaluation found."""

from __future__ import annotations

from typing import Any, Protocol

from escala.schema import ConvertConfig
from escala.storage.checkpoints import Checkpoint
from workloads.training.supervised import SupervisedStep
from workloads.training.task import Task

STATE = "conversion"


class ConversionTask(Task, Protocol):
    """A task that knows the gap to the exact model: `workloads.convert`."""

    gaps: dict[str, float]


class ConversionStep(SupervisedStep):
    """One rank's part (training.step.Step)."""

    task: ConversionTask

    def __init__(self, config: ConvertConfig, task: ConversionTask) -> None:
        super().__init__(config, task)

    def state(self) -> dict[str, Any]:
        """See Step: the exact model's held-out loss, and the gap before the first step."""
        return {STATE: self.task.gaps}

    def restore(self, found: Checkpoint) -> None:
        """See Step."""
        self.task.gaps = found.part(STATE, dict)
