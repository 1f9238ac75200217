"""One rank of a run that trains: its entry point's step in the run loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workloads.training.entry import WorkerInputs, load_entry
from workloads.training.loop import Trainer
from workloads.training.task import Evaluation


def train(inputs: WorkerInputs[Any], on_evaluation: Callable[[int, Evaluation], None] | None = None) -> None:
    """Train to the end, or to the first reason to stop, in this rank's process group. Raises what Trainer raises.

    Args:
        on_evaluation: is told the step and what each evaluation found.
    """
    made = load_entry(inputs.spec.entry_point).make_step(inputs)
    trainer = made if isinstance(made, Trainer) else Trainer(inputs, lambda _: made)
    trainer.on_evaluation = on_evaluation
    try:
        trainer.run()
    finally:
        trainer.close()
