"""Jobs as the store hands them out: frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from escala.contract.records import Progress, Totals
from escala.jobs.state import JobStanding, Queued, State

MOST, MOST_TOKENS = 1e30, 2**56  # that an attempt can spend: FLOPs, seconds, joules; tokens
CHOSEN_TAG = "escala.chosen."  # begins the tags of what was left to choose: then the dotted key
RATES_TAG = "escala.rates"  # what workloads/training/energy.py reads
OWN_KEY = "command-"  # begins the idempotency keys that nobody gave: one for each submission


@dataclass(frozen=True)
class NewJob:
    """What somebody asks for. `after` and `parent` name jobs, as JobStore.get takes them."""

    workload: str
    entry_point: str
    config: dict[str, Any]  # resolved
    name: str | None = None  # None: the workload's name
    command: tuple[str, ...] = ()  # the command line as typed
    priority: int = 50
    retries: int = 2
    after: str | None = None
    max_flops: float | None = None
    max_seconds: float | None = None
    resume_from: str | None = None  # another job's checkpoint directory
    parent: str | None = None  # the job that this one retries or resumes
    experiment: str = "escala"
    tags: dict[str, str] = field(default_factory=dict)
    idempotency_key: str | None = (
        None  # the same key again is the same job; None: one for this submission alone
    )


@dataclass(frozen=True)
class Job:
    """A job and where it stands. Times: Unix seconds. Sums: over its attempts, None where none reported."""

    order: int  # submit order
    id: str
    name: str
    workload: str
    entry_point: str
    experiment: str
    config: dict[str, Any]
    command: list[str]
    tags: dict[str, str]
    priority: int
    retries: int
    retries_used: int
    after: str | None
    max_flops: float | None
    max_seconds: float | None
    resume_from: str | None
    parent: str | None
    submitted_at: float
    state: State
    reason: str | None
    message: str
    hint: str
    revision: int
    stop_requested: bool
    attempts: int  # started so far; the number of the last one
    changed_at: float
    train_tokens: int | None
    compute_flops: float | None
    wall_seconds: float | None
    energy_joules: float | None
    idempotency_key: str | None = None
    spec_hash: str | None = None

    @property
    def standing(self) -> JobStanding:
        """What the state machine reads."""
        stop = self.reason if self.state == "stopping" else None
        return JobStanding(self.id, self.state, self.attempts, self.retries, self.retries_used, stop)

    @property
    def has_own_key(self) -> bool:
        """Whether nobody gave its idempotency key."""
        return self.idempotency_key is None or self.idempotency_key.startswith(OWN_KEY)

    @property
    def place(self) -> Queued:
        """Its place in the queue."""
        return Queued(self.id, self.priority, self.order)

    @property
    def totals(self) -> Totals:
        """Sums over the attempts."""
        return Totals(
            self.attempts, self.train_tokens, self.compute_flops, self.wall_seconds, self.energy_joules
        )


@dataclass(frozen=True)
class Usage:
    """What one attempt has spent; None where it did not report."""

    train_tokens: int | None = None
    compute_flops: float | None = None
    wall_seconds: float | None = None
    energy_joules: float | None = None

    @classmethod
    def of(cls, progress: Progress | None, record: Mapping[str, Any] | None) -> Usage:
        """From the last progress and the RunRecord (plain data), which wins where it has the number."""
        found = [(f, getattr(progress, f, None)) for f in _PROGRESS_FIELDS]
        found += [(f, (record or {}).get(key)) for f, key in _RECORD_KEYS.items()]
        known: dict[str, Any] = {f: value for f, value in found if _plausible(f, value)}
        if "train_tokens" in known:
            known["train_tokens"] = int(known["train_tokens"])
        return cls(**known)


def _plausible(name: str, value: Any) -> bool:
    """Whether it is a number that can be summed, and not what a damaged file holds in its place."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < (MOST_TOKENS if name == "train_tokens" else MOST)


_PROGRESS_FIELDS = ("train_tokens", "compute_flops", "wall_seconds")
_RECORD_KEYS = {
    "train_tokens": "attempt_tokens",
    "compute_flops": "attempt_flops",
    "wall_seconds": "wall_seconds",
    "energy_joules": "energy_joules",
}


@dataclass(frozen=True)
class Attempt:
    """One start of a job."""

    job_id: str
    number: int
    claimed_at: float
    submitted_at: float | None  # the backend has it
    running_at: float | None
    stopping_at: float | None
    ended_at: float | None
    outcome: str | None  # records.Outcome's kind
    message: str
    hint: str
    checkpoint: str | None
    progress: dict[str, Any] | None  # records.Progress
    record: dict[str, Any] | None  # records.RunRecord
    train_tokens: int | None
    compute_flops: float | None
    wall_seconds: float | None
    energy_joules: float | None
    delivered: bool

    @property
    def submission_id(self) -> str:
        """The backend's name for it: always the same, so that nothing is submitted twice."""
        return f"{self.job_id}-{self.number}"


@dataclass(frozen=True)
class HistoryEvent:
    """One line of a job's history."""

    number: int
    job_id: str
    attempt: int
    at: float
    state: State
    reason: str | None
    message: str
