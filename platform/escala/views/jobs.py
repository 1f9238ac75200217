"""Jobs: one in the list, one in full, one that is followed."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from escala.views.base import View


class JobView(View):
    """A job and where it stands. Times: Unix seconds. Sums: over its attempts, None where none reported."""

    order: int  # submit order
    id: str
    name: str
    workload: str
    entry_point: str
    experiment: str
    config: dict[str, Any]  # resolved
    command: tuple[str, ...]
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
    state: str
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
    idempotency_key: str | None
    spec_hash: str | None
    has_own_key: bool = Field(exclude=True)  # nobody gave the idempotency key


class TotalsView(View):
    """A job's sums over its attempts. None where no attempt reported."""

    attempts: int
    train_tokens: int | None
    compute_flops: float | None
    wall_seconds: float | None
    energy_joules: float | None


class AttemptView(View):
    """One start of a job."""

    job_id: str
    number: int
    claimed_at: float
    submitted_at: float | None  # the backend has it
    running_at: float | None
    stopping_at: float | None
    ended_at: float | None
    outcome: str | None
    message: str
    hint: str
    checkpoint: str | None
    progress: dict[str, Any] | None
    record: dict[str, Any] | None  # a run's record
    train_tokens: int | None
    compute_flops: float | None
    wall_seconds: float | None
    energy_joules: float | None
    delivered: bool  # all of it is in the tracker


class EventView(View):
    """One line of a job's history."""

    number: int
    job_id: str
    attempt: int
    at: float  # Unix seconds
    state: str
    reason: str | None
    message: str


class JobDetailsView(View):
    """A job with its attempts and its history. `runs`: the MLflow run of each attempt, None until it is delivered."""

    job: JobView
    totals: TotalsView
    attempts: tuple[AttemptView, ...]
    runs: tuple[str | None, ...]
    events: tuple[EventView, ...]


class ProgressView(View):
    """How far an attempt is, and what this attempt (not its predecessors) has spent."""

    step: int
    total_steps: int
    train_tokens: int
    compute_flops: float
    wall_seconds: float
    loss_nats: float | None
    tokens_per_second: float | None
    model_flops_utilization: float | None
    updated_at: float  # Unix seconds
    remaining_seconds: float | None


class WatchedJobView(View):
    """A job at one moment: its row, its attempt's progress, and what it does while there is none yet."""

    job: JobView
    progress: ProgressView | None
    doing: str
