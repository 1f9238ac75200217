"""The life of a job: first as prose, then as pure functions on frozen records. No clock, no files.

1. A job is submitted `queued`. It keeps its place (priority, then submit order) until it ends, retries
   included.
2. A queued job with `after` waits until that job has succeeded. If that job failed or was stopped, the
   waiting job becomes `failed` with the reason "dependency", which names it.
3. A queued job whose earlier attempts have spent its budget becomes `stopped` with the reason "budget".
4. When a slot is free, the first queued job in order is claimed: `starting`, with a new attempt numbered
   from 1.
5. A starting job whose driver is seen at work is `running`.
6. A stop that a user asks for ends a queued job at once: `stopped`, reason "user". A starting or running
   job becomes `stopping`: the attempt is asked to write a checkpoint and end; after a grace its driver is
   killed. One that has not made a step yet has nothing to write: its driver is killed at once.
7. A starting or running job that overruns its budget of seconds becomes `stopping` in the same way, reason
   "budget".
8. An attempt ends with an outcome, or is found lost (outcome "driver_lost"). From starting, running or
   stopping:
   a. "succeeded" -> `succeeded`.
   b. "user" or "budget" -> `stopped` with that reason.
   c. "worker_lost", "node_lost", "driver_lost", "preempted" -> `stopped` with the stop's reason if the job
      was stopping; else `queued` again if it may be retried; else `failed` with that reason. A preemption
      uses up no retry. A job has at most 100 attempts.
   d. every other outcome ("user_error", "out_of_memory", "diverged", "superseded", "internal", and words of
      a newer version) -> `failed` with that reason: another attempt would end the same way.
9. `succeeded` is final. A `failed` or `stopped` job ends there too, unless a user retries it: `queued` again
   in its old place, its retries renewed; the next attempt goes on from the last checkpoint.

Everything else is an illegal transition and raises StateError.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from escala.contract.errors import StateError

State = Literal["queued", "starting", "running", "stopping", "succeeded", "failed", "stopped"]

STATES: tuple[State, ...] = ("queued", "starting", "running", "stopping", "succeeded", "failed", "stopped")
ACTIVE: tuple[State, ...] = ("starting", "running", "stopping")  # an attempt may be at work
OPEN: tuple[State, ...] = ("queued", *ACTIVE)  # the reconcile loop has something to do
ALIVE: tuple[State, ...] = (*OPEN, "succeeded")  # what a name means: a failed namesake does not count
FINAL: tuple[State, ...] = ("succeeded", "failed", "stopped")
LOST = frozenset({"worker_lost", "node_lost", "driver_lost"})  # retried while retries are left
ATTEMPTS_CAP = 100  # preemptions use up no retry; this bounds them


@dataclass(frozen=True)
class JobStanding:
    """The part of a job that decides what may happen to it."""

    id: str
    state: State
    attempts: int = 0  # started so far
    retries: int = 0  # allowed
    retries_used: int = 0
    stop_reason: str | None = None  # "user" | "budget" while stopping


@dataclass(frozen=True)
class Claimed:
    """A slot is free and the job is first in order."""


@dataclass(frozen=True)
class DriverSeen:
    """The attempt's driver is at work."""


@dataclass(frozen=True)
class StopRequested:
    """A user asks for the job to end."""


@dataclass(frozen=True)
class RetryRequested:
    """A user asks for a failed or stopped job to be queued again."""


@dataclass(frozen=True)
class BudgetOverrun:
    """The attempt has gone on for longer than the job's budget of seconds allows."""


@dataclass(frozen=True)
class BudgetSpent:
    """The attempts so far have used the job's budget up; `message` gives the numbers."""

    message: str


@dataclass(frozen=True)
class DependencyEnded:
    """The job that this one waits for ended without success."""

    job_id: str
    state: str


@dataclass(frozen=True)
class AttemptEnded:
    """The attempt ended with an outcome of this kind (`records.Outcome`), or was found lost."""

    kind: str
    message: str = ""


Event = (
    Claimed
    | DriverSeen
    | StopRequested
    | RetryRequested
    | BudgetOverrun
    | BudgetSpent
    | DependencyEnded
    | AttemptEnded
)


@dataclass(frozen=True)
class StateChange:
    """What follows from an event."""

    state: State
    reason: str | None = None  # why it stops, failed, was stopped or is queued again
    message: str = ""
    attempt: int | None = None  # the number of the attempt to start now
    uses_retry: bool = False
    at: float = 0.0  # Unix seconds


def transition(job: JobStanding, event: Event, now: float) -> StateChange:
    """What `event` makes of `job` at `now` (Unix seconds). Raises StateError where it may not happen."""
    match event:
        case Claimed() if job.state == "queued":
            return StateChange("starting", attempt=job.attempts + 1, at=now)
        case DriverSeen() if job.state == "starting":
            return StateChange("running", at=now)
        case StopRequested() if job.state == "queued":
            return StateChange("stopped", "user", "stopped before it started", at=now)
        case StopRequested() if job.state in ("starting", "running"):
            return StateChange("stopping", "user", at=now)
        case RetryRequested() if job.state in ("failed", "stopped"):
            return StateChange("queued", "user", "a user retries it", at=now)
        case BudgetOverrun() if job.state in ("starting", "running"):
            return StateChange("stopping", "budget", at=now)
        case BudgetSpent(message) if job.state == "queued":
            return StateChange("stopped", "budget", message, at=now)
        case DependencyEnded(other, state) if job.state == "queued":
            return StateChange("failed", "dependency", f"job {other}, which it waits for, is {state}", at=now)
        case AttemptEnded(kind, message) if job.state in ACTIVE:
            return _ended(job, kind, message, now)
    raise _illegal(job, event)


def _ended(job: JobStanding, kind: str, message: str, now: float) -> StateChange:
    """Rule 8."""
    if kind == "succeeded":
        return StateChange("succeeded", at=now)
    if kind in ("user", "budget"):
        return StateChange("stopped", kind, message, at=now)
    if kind not in LOST and kind != "preempted":
        return StateChange("failed", kind, message, at=now)
    if job.state == "stopping":
        return StateChange("stopped", job.stop_reason or "user", message, at=now)
    if job.attempts >= ATTEMPTS_CAP:
        return _failed(kind, message, f"{ATTEMPTS_CAP} attempts, the most a job may have", now)
    if kind == "preempted":
        return StateChange("queued", kind, message, at=now)
    if job.retries_used < job.retries:
        return StateChange("queued", kind, message, uses_retry=True, at=now)
    return _failed(kind, message, f"no retry left of {job.retries}", now)


def _failed(kind: str, message: str, why_not_again: str, now: float) -> StateChange:
    return StateChange("failed", kind, f"{message} ({why_not_again})".strip(), at=now)


def _illegal(job: JobStanding, event: Event) -> StateError:
    if isinstance(event, StopRequested):
        what = "already stopping" if job.state == "stopping" else f"already {job.state}"
        return StateError(f"job {job.id} is {what}", "only a queued, starting or running job can be stopped")
    if isinstance(event, RetryRequested):
        hint = "`escala submit` starts it again" if job.state == "succeeded" else "stop it first"
        return StateError(
            f"job {job.id} is {job.state}", f"only a failed or stopped job can be retried; {hint}"
        )
    return StateError(
        f"job {job.id} is {job.state}: {type(event).__name__} may not happen to it",
        "another process moved it on; look again with `escala jobs show`",
    )


@dataclass(frozen=True)
class Queued:
    """A queued job's place: a higher priority first, then a lower `order` (submit order)."""

    id: str
    priority: int  # 0-100
    order: int


def next_to_start(queued: Iterable[Queued], active: int, limit: int) -> list[Queued]:
    """What to start now, in order: priority, then first in first out, while fewer than `limit` are active."""
    free = max(0, limit - active)
    return sorted(queued, key=lambda job: (-job.priority, job.order))[:free]


@dataclass(frozen=True)
class BudgetUse:
    """What a job's attempts have used so far; None where no attempt reported."""

    compute_flops: float | None
    wall_seconds: float | None


def budget_spent(max_flops: float | None, max_seconds: float | None, spent: BudgetUse) -> str | None:
    """Why no further attempt may start, with the numbers; None while budget is left."""
    flops, seconds = spent.compute_flops or 0.0, spent.wall_seconds or 0.0
    if max_flops is not None and flops >= max_flops:
        return f"its attempts used {flops:.4g} FLOPs of {max_flops:.4g}"
    if max_seconds is not None and seconds >= max_seconds:
        return f"its attempts used {seconds:.1f} s of {max_seconds:.1f} s"
    return None


def remaining(limit: float | None, spent: float | None) -> float | None:
    """A budget less what was spent of it, never below 0; None without a limit."""
    return None if limit is None else max(0.0, limit - (spent or 0.0))
