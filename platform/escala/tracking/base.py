"""What escala asks of an experiment tracker: the protocol that each kind implements, and what it is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Lifecycle = Literal["active", "deleted", "absent"]


@dataclass(frozen=True)
class Metric:
    """One number of a run. `step` counts optimiser steps; `time_ms` is Unix milliseconds."""

    key: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True)
class Dataset:
    """The data of a run, for the tracker's column of data sets."""

    name: str
    digest: str  # a fingerprint: equal data have equal ones
    context: str = "training"  # what it was used for
    source: dict[str, Any] = field(default_factory=dict)  # where it comes from
    profile: dict[str, Any] = field(default_factory=dict)  # numbers and fingerprints


class Tracker(Protocol):
    """`key` names a run for escala ("JOB-ATTEMPT"): `start` twice with one key is one run.

    One process writes a run in MLflow; in a spool several may (the driver, rank 0), each by its own tracker.
    """

    def start(
        self,
        key: str,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        time_ms: int | None = None,
    ) -> str:
        """Open the run, or find the one that the same key opened before. Returns its id for other calls.

        `time_ms`: when it began, in Unix milliseconds; None: now.
        """
        ...

    def metrics(self, run_id: str, metrics: Iterable[Metric]) -> None:
        """Record metrics; a repeated (key, step, time, value) counts once."""
        ...

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags (and overwrite earlier ones of the same name)."""
        ...

    def dataset(self, run_id: str, dataset: Dataset) -> None:
        """Say what data the run reads; the same again counts once."""
        ...

    def text(self, run_id: str, path: str, content: str) -> None:
        """Store `content` as the artifact `path`."""
        ...

    def finish(self, run_id: str, status: str, time_ms: int | None = None) -> None:
        """Close the run. `status`: FINISHED, FAILED or KILLED (MLflow's words). `time_ms` as in `start`."""
        ...

    def drain(self) -> None:
        """Return once nothing of what was said can be lost any more; waits for room on a full disk."""
        ...

    def lifecycle(self, run_id: str) -> Lifecycle:
        """Whether the run is there to be written: a person may have deleted it."""
        ...
