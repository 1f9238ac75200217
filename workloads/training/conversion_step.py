"""The step of a conversion: a supervised one that keeps what its first evaluation found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from escala.schema import ConvertConfig
from escala.storage.checkpoints import Checkpoint
from workloads.training.supervised import SupervisedStep

if TYPE_CHECKING:
    from workloads.convert import Conversion

STATE = "conversion"


class ConversionStep(SupervisedStep):
    """One rank's part (training.step.Step)."""

    task: Conversion

    def __init__(self, config: ConvertConfig, task: Conversion) -> None:
        super().__init__(config, task)

    def state(self) -> dict[str, Any]:
        """See Step: the exact model's held-out loss, and the gap before the first step."""
        return {STATE: self.task.gaps}

    def restore(self, found: Checkpoint) -> None:
        """See Step."""
        self.task.gaps = found.part(STATE, dict)
