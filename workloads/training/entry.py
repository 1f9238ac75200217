"""What a workload that trains gives its driver and its workers: the `ENTRY` of its module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

from escala.contract.records import AttemptSpec
from escala.schema import WORKLOADS, TrainedConfig
from workloads.training.step import Step
from workloads.training.task import Task

C = TypeVar("C", bound=TrainedConfig)


@dataclass(frozen=True)
class Prepared:
    """What an entry point has made ready for its workers."""

    path: str  # for `make_step`
    tokenizer: Path | None  # a tokenizer.json or a directory with one, kept with checkpoints; None: no text
    fingerprints: dict[str, str]  # corpus, tokenizer, evaluation


@dataclass(frozen=True)
class WorkerInputs(Generic[C]):
    """What the driver gives every worker; C is the workload's configuration."""

    spec: AttemptSpec
    prepared: str  # path of the prepared data
    checkpoint: str | None  # a verified one to resume from
    run_id: str  # of the tracker
    fingerprints: dict[str, str]  # corpus, tokenizer, evaluation

    @cached_property
    def config(self) -> C:
        """The workload's configuration."""
        config: C = WORKLOADS[self.spec.workload].parse(self.spec.config)
        return config


def no_sidecar(inputs: WorkerInputs[Any]) -> AbstractContextManager[None]:
    """Nothing runs beside the workers."""
    return nullcontext()


@dataclass(frozen=True)
class Entry(Generic[C]):
    """The parts of a workload that trains.

    Args:
        prepare: in the driver, data made ready. Raises DataError.
        make_step: in a worker, in its process group: its part of the steps.
        sidecar: in the driver, what runs while the workers do.
    """

    prepare: Callable[[AttemptSpec, C], Prepared]
    make_step: Callable[[WorkerInputs[C]], Step]
    sidecar: Callable[[WorkerInputs[C]], AbstractContextManager[None]] = no_sidecar


def load_entry(entry_point: str) -> Entry[Any]:
    """The `ENTRY` of the module `entry_point`."""
    entry: Entry[Any] = resolve_name(f"{entry_point}:ENTRY")
    return entry


def supervised(make_task: Callable[[WorkerInputs[C]], Task]) -> Callable[[WorkerInputs[C]], Step]:
    """The `make_step` of a workload whose steps are those of a task."""

    def make_step(inputs: WorkerInputs[C]) -> Step:
        # Here, since it needs DeepSpeed, which the driver does without.
        from workloads.training.supervised import SupervisedStep

        return SupervisedStep(inputs.config, make_task(inputs))

    return make_step
