"""The reconcile loop: makes what runs agree with what the store says.

Killed between any two lines and started again, it loses nothing and doubles nothing, because
- an attempt is claimed in the store first, then submitted under an id that follows from it (JOB-ATTEMPT);
- a claimed attempt that the backend does not know is submitted again only if the store does not say that it
  was submitted and it has left no log: otherwise it ran, and is lost;
- the fence (`AttemptFiles.current`) moves to the new attempt before that is submitted, so that an old driver
  that outlived its Ray head may no longer write;
- an outcome is read from the attempt's directory and stored with the job's new state in one transaction.

A full disk only makes it wait: what it could not write is written in a later step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import ParamSpec

from escala.contract import handshake
from escala.contract.errors import ClusterError
from escala.contract.files import no_room
from escala.contract.records import (
    TEXT_CHARACTERS,
    AttemptFiles,
    AttemptSpec,
    Control,
    JobFiles,
    Outcome,
    Progress,
)
from escala.jobs.backends.base import JobBackend, Submission
from escala.jobs.records import Attempt, Job, Usage
from escala.jobs.state import (
    BudgetOverrun,
    BudgetSpent,
    BudgetUse,
    DependencyEnded,
    DriverSeen,
    Event,
    budget_spent,
    next_to_start,
    remaining,
)
from escala.jobs.store import JobStore, LostRace
from escala.storage.files import open_files, read_stored, write_stored
from escala.tracking.lineage.notes import command_tag

log = logging.getLogger("escala.runner")
P = ParamSpec("P")

KIND_CHARACTERS = 32  # of an outcome, in the database
LOOK_AHEAD = 64  # queued jobs looked at in one step; more only matter once these have started


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    interval: float = 0.5  # between steps
    stop_grace: float = 60.0  # from asking an attempt to stop to killing it
    budget_grace: float = 30.0  # beyond the budget before we ask: the workload stops by itself at the limit
    lost_grace: float = 5.0  # from a driver's end to calling it lost: shared storage may be late
    submit_grace: float = 120.0  # of a reachable head that refuses to start an attempt
    progress_every: float = 1.0  # between two stored progress reports of an attempt
    kill_every: float = 10.0


class Reconciler:
    """One step at a time; everything that is not pure is injected.

    Args:
        store: the truth.
        backend: where attempts run.
        home: holds `jobs/JOB/attempt-N`, `jobs/JOB/checkpoints` and `data`; shared with the cluster's nodes.
        environment: the environment variables of a job (`escala.runtime_env`).
        limit: jobs at work at the same time.
        deliver: carries an attempt directory's spool to the tracker; True once all of it is there. Its
            second argument: the attempt was lost, so that nobody else closes its run.
        clock: Unix seconds.
        ticks: seconds of a clock that nobody sets; None: `clock`. What is waited for is measured by it.
    """

    def __init__(
        self,
        store: JobStore,
        backend: JobBackend,
        home: Path,
        environment: Callable[[Job], Mapping[str, str]],
        limit: int,
        deliver: Callable[[Path, bool], bool],
        clock: Callable[[], float],
        timing: Timing = Timing(),
        ticks: Callable[[], float] | None = None,
    ) -> None:
        self._store, self._backend, self._files = store, backend, open_files(home)
        self._environment, self._limit, self._deliver = environment, limit, deliver
        self._clock, self._timing, self._ticks = clock, timing, ticks or clock
        self._versions = handshake.versions()
        # (what, submission id) -> when first seen; kept in memory: a restarted loop only waits longer
        self._since: dict[tuple[str, str], float] = {}
        self._said: dict[str, str] = {}  # subject -> the last trouble logged about it

    def step(self) -> None:
        """Advance every active job, drop jobs whose dependency is broken, start what may start."""
        if not self._store.has_work():
            return
        for job in self._store.active():
            self._guard(job.id, self._advance, job)
        for job, other, state in self._store.broken_dependencies():
            self._guard(job.id, self._apply, job, DependencyEnded(other, state))
        if self._store.queue(1) and self._backend.reachable():
            self._guard("queue", self._start)

    def deliver(self) -> None:
        """Carry the tracking of all attempts that is not at the tracker yet."""
        for attempt in self._store.undelivered():
            self._guard(f"tracking of {attempt.submission_id}", self._deliver_one, attempt)

    def directory(self, attempt: Attempt) -> Path:
        """The attempt's directory."""
        return self._files.local(JobFiles(Path(), attempt.job_id).attempt(attempt.number).directory)

    # Jobs with an attempt at work

    def _advance(self, job: Job) -> None:
        attempts = self._store.attempts(job.id)
        if not attempts or attempts[-1].number != job.attempts:  # it would keep its slot forever
            message = f"its attempt {job.attempts} cannot be read from the job database"
            self._finish(
                job, Outcome("internal", message, f"`escala jobs retry {job.id}` starts another"), None
            )
            return
        attempt = attempts[-1]
        files = JobFiles(Path(), job.id).attempt(attempt.number)
        progress = read_stored(self._files, Progress, files.progress)
        outcome = read_stored(self._files, Outcome, files.outcome)
        if outcome is not None:
            self._finish(job, outcome, progress)
            return
        self._guard(f"progress of {attempt.submission_id}", self._note_progress, attempt, progress)
        if job.state == "stopping" and self._has(files.spec) and not self._has(files.control):
            write_stored(self._files, files.control, Control(job.reason or "user"))
        if attempt.submitted_at is not None:
            self._keep_fence(files, attempt.number)
        match self._backend.status(attempt.submission_id):
            case "absent" if attempt.submitted_at is None and not self._has(files.log):
                self._submit(job, attempt, files)
            case "absent":
                self._gone(job, attempt, progress, "the Ray head was restarted and has lost the job's driver")
            case "ended":
                self._gone(job, attempt, progress, "the job's driver ended without an outcome")
            case _ if job.state == "stopping" and not (progress and progress.trained):
                self._end_at_once(job, attempt, files, progress)
            case status:
                self._at_work(job, attempts, progress, working=status == "running")

    def _at_work(
        self, job: Job, attempts: Sequence[Attempt], progress: Progress | None, *, working: bool
    ) -> None:
        attempt, now = attempts[-1], self._clock()
        self._since.pop(("gone", attempt.submission_id), None)
        if attempt.submitted_at is None:
            self._store.record_submitted(attempt)
        if job.state == "stopping":
            late = now - (attempt.stopping_at or job.changed_at) > self._timing.stop_grace
            if late and self._due("kill", attempt, self._timing.kill_every):
                log.info("%s did not stop in time: its driver is killed", attempt.submission_id)
                self._backend.stop(attempt.submission_id)
            return
        if job.state == "starting" and working:
            job = self._apply(job, DriverSeen())
        earlier = sum(a.wall_seconds or 0.0 for a in attempts[:-1])
        if _overrun_seconds(job, attempt, earlier, progress, now) > self._timing.budget_grace:
            self._apply(job, BudgetOverrun())

    def _end_at_once(
        self, job: Job, attempt: Attempt, files: AttemptFiles, progress: Progress | None
    ) -> None:
        """Stop a driver that still starts: there is no checkpoint to wait for, and Ray Train, DeepSpeed or Serve may
        take minutes until they look at the request. Should it outlive the kill, it stops at its first step.
        """
        self._backend.stop(attempt.submission_id)
        log.info("%s is stopped before its first step: its driver is killed", attempt.submission_id)
        outcome = Outcome(job.reason or "user", "stopped before its first step")
        write_stored(
            self._files, files.outcome, outcome
        )  # without a record: delivery closes the run as KILLED
        self._finish(job, outcome, progress)

    def _has(self, name: PurePath) -> bool:
        return self._files.exists(name)

    def _keep_fence(self, files: AttemptFiles, number: int) -> None:
        """Write the fence again where it was lost or damaged, and names no attempt."""
        try:
            damaged = not self._files.read(files.current).strip().isdigit()
        except (FileNotFoundError, NotADirectoryError):
            damaged = self._has(files.directory)
        except ValueError:
            damaged = True
        if damaged:
            log.warning("%s names no attempt; it is written again", self._files.local(files.current))
            write_stored(self._files, files.current, number)

    def _gone(self, job: Job, attempt: Attempt, progress: Progress | None, message: str) -> None:
        if self._waited("gone", attempt) >= self._timing.lost_grace:
            hint = f"`escala logs {job.id}` shows its last words"
            self._finish(job, Outcome("driver_lost", message, hint), progress)

    def _finish(self, job: Job, outcome: Outcome, progress: Progress | None) -> None:
        kind = _storable(outcome.kind, KIND_CHARACTERS)
        message, hint = (_storable(text, TEXT_CHARACTERS) for text in (outcome.message, outcome.hint))
        checkpoint = outcome.checkpoint and _storable(outcome.checkpoint, TEXT_CHARACTERS)
        outcome = replace(outcome, kind=kind, message=message, hint=hint, checkpoint=checkpoint)
        self._log(self._store.finish(job, outcome, Usage.of(progress, outcome.record)))

    def _note_progress(self, attempt: Attempt, progress: Progress | None) -> None:
        stored = (attempt.progress or {}).get("updated_at")
        stored = stored if isinstance(stored, int | float) else 0.0
        # The distance: a clock that was set back makes the newer one seem older.
        if progress is not None and abs(progress.updated_at - stored) >= self._timing.progress_every:
            self._store.record_progress(attempt, progress)

    # Jobs that start

    def _start(self) -> None:
        """Start what may start. A job that cannot be started takes nobody's place."""
        if len(self._store.active()) >= self._limit:
            return
        queue: dict[str, Job] = {}
        for job in self._store.queue(LOOK_AHEAD):
            self._guard(job.id, self._line_up, job, queue)
        while first := self._next(queue):
            self._guard(first, self._begin, queue.pop(first))

    def _line_up(self, job: Job, queue: dict[str, Job]) -> None:
        """Add a job to `queue`, or end it where its budget is spent."""
        why = budget_spent(job.max_flops, job.max_seconds, BudgetUse(job.compute_flops, job.wall_seconds))
        if why is None:
            queue[job.id] = job
        else:
            self._apply(job, BudgetSpent(why))

    def _next(self, queue: Mapping[str, Job]) -> str | None:
        """The job of `queue` that starts next; None where none may."""
        places = [job.place for job in queue.values()]
        return next(
            (place.id for place in next_to_start(places, len(self._store.active()), self._limit)), None
        )

    def _begin(self, job: Job) -> None:
        attempt = self._store.claim_start(job)
        log.info("%s: attempt %d is claimed", attempt.job_id, attempt.number)
        self._advance(self._store.get(job.id))

    def _submit(self, job: Job, attempt: Attempt, files: AttemptFiles) -> None:
        """Write the attempt's directory and fence, then submit. Repeating any part of it changes nothing."""
        if job.state == "stopping":  # asked to stop before it ever ran
            self._finish(job, Outcome(job.reason or "user", "stopped before it started"), None)
            return
        try:
            submission = self._submission(job, attempt, files)
            given = self._spec(job, attempt, files)
        except (TypeError, ValueError, AttributeError, KeyError) as error:  # a row that somebody has changed
            message = f"its configuration cannot be used: {type(error).__name__}: {error}"
            self._finish(job, Outcome("internal", message, "submit it again"), None)
            return
        write_stored(self._files, files.spec, given)
        write_stored(self._files, files.current, attempt.number)
        if attempt.number > 1:
            self._kill_predecessor(attempt)
        try:
            self._backend.submit(submission)
        except ClusterError as error:
            if self._waited("refused", attempt) < self._timing.submit_grace or not self._backend.reachable():
                raise
            self._finish(job, Outcome("driver_lost", error.message, error.hint), None)
            return
        self._store.record_submitted(attempt)
        log.info("%s is submitted", attempt.submission_id)

    def _submission(self, job: Job, attempt: Attempt, files: AttemptFiles) -> Submission:
        labels = {"escala_job": job.id, "escala_attempt": str(attempt.number)}
        spec, output = self._files.local(files.spec), self._files.local(files.log)
        environment = self._environment(job)
        return Submission(attempt.submission_id, job.entry_point, spec, output, environment, labels)

    def _spec(self, job: Job, attempt: Attempt, files: AttemptFiles) -> AttemptSpec:
        return AttemptSpec(
            job_id=job.id,
            attempt=attempt.number,
            name=job.name,
            workload=job.workload,
            entry_point=job.entry_point,
            config=job.config,
            directory=str(self._files.local(files.directory)),
            checkpoints=str(self._files.local(JobFiles(Path(), job.id).checkpoints)),
            data=str(self._files.local(Path("data"))),
            tracking_uri=f"spool:{self._files.local(files.spool)}",
            experiment=job.experiment,
            tags={**job.tags, **command_tag(job.command)},
            resume_from=job.resume_from,
            remaining_flops=remaining(job.max_flops, job.compute_flops),
            remaining_seconds=remaining(job.max_seconds, job.wall_seconds),
            versions=self._versions,
        )

    def _kill_predecessor(self, attempt: Attempt) -> None:
        """Best effort: the fence is what keeps an old driver from writing."""
        try:
            self._backend.stop(f"{attempt.job_id}-{attempt.number - 1}")
        except ClusterError as error:
            log.warning("%s: its predecessor was not killed: %s", attempt.submission_id, error.message)

    # Tracking

    def _deliver_one(self, attempt: Attempt) -> None:
        ended = attempt.ended_at is not None  # read before the delivery: later lines belong to the next one
        if self._deliver(self.directory(attempt), attempt.outcome == "driver_lost") and ended:
            self._store.record_delivered(attempt)

    # Waiting and saying

    def _waited(self, what: str, attempt: Attempt) -> float:
        """Seconds since this was first seen."""
        now = self._ticks()
        return now - self._since.setdefault((what, attempt.submission_id), now)

    def _due(self, what: str, attempt: Attempt, every: float) -> bool:
        key, now = (what, attempt.submission_id), self._ticks()
        due = key not in self._since or now - self._since[key] >= every
        if due:
            self._since[key] = now
        return due

    def _apply(self, job: Job, event: Event) -> Job:
        return self._log(self._store.apply(job, event))

    def _log(self, job: Job) -> Job:
        log.info("%s is %s%s", job.id, job.state, f" ({job.reason}: {job.message})" if job.reason else "")
        return job

    def _guard(self, subject: str, act: Callable[P, object], *args: P.args, **named: P.kwargs) -> None:
        """One job's trouble must not hold the others up; the same trouble is logged once, and tried again."""
        try:
            act(*args, **named)
            self._said.pop(subject, None)
        except LostRace as race:
            log.info("%s", race.message)
        except ClusterError as error:
            if self._said.get(subject) != error.message:
                log.warning("%s: %s", subject, error.message)
            self._said[subject] = error.message
        except Exception as error:
            if self._said.get(subject) != repr(error):
                if no_room(error):
                    log.warning("%s waits until there is room on the disk: %s", subject, error)
                else:
                    log.exception("%s: an error in escala itself; it is tried again", subject)
            self._said[subject] = repr(error)


def _storable(text: str, characters: int) -> str:
    """What a database takes of a text: no bytes of a file name that were no UTF-8, no NUL, no more than so much."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")[:characters]


def _overrun_seconds(
    job: Job, attempt: Attempt, earlier: float, progress: Progress | None, now: float
) -> float:
    """Seconds beyond the job's budget; negative while there is some left.

    Counts from the attempt's first step, or from its driver's start while no step is reported, so that a
    start-up that hangs ends too.
    """
    if job.max_seconds is None:
        return float("-inf")
    began = attempt.running_at or now
    if progress is not None:
        began = progress.updated_at - progress.wall_seconds
    return now - began - (job.max_seconds - earlier)
