"""One rank of a run that trains: its workload's step in the run loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workloads.training.entry import WorkerInputs, load_entry
from workloads.training.loop import RunLoop
from workloads.training.task import Evaluation


def train(inputs: WorkerInputs[Any], on_evaluation: Callable[[int, Evaluation], None] | None = None) -> None:
    """Train to the end, or to the first reason to stop, in this rank's process group. Raises what RunLoop raises.

    Args:
        on_evaluation: is told the step and what each evaluation found.
    """
    loop = RunLoop(inputs, load_entry(inputs.spec.entry_point).make_step, on_evaluation)
    try:
        loop.run()
    finally:
        loop.close()
