"""The job database: queue and history. The store is the truth; Ray is asked and told.

Every change of a job is one transaction with a compare-and-set on its `revision`: of two that act on
the same reading of a job, one wins and the other gets LostRace. So no attempt is ever started by two.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, or_, select, update
from sqlalchemy.sql import Select

from escala.contract.errors import ClusterError, NotFoundError, StateError
from escala.contract.records import Outcome, Progress
from escala.jobs import tables
from escala.jobs.database import open_engine, reading, writing
from escala.jobs.identity import check_same, own_key, spec_hash
from escala.jobs.records import Attempt, HistoryEvent, Job, NewJob, Usage
from escala.jobs.rows import RowReader
from escala.jobs.state import (
    ACTIVE,
    ALIVE,
    OPEN,
    STATES,
    AttemptEnded,
    Claimed,
    DriverSeen,
    Event,
    RetryRequested,
    State,
    StateChange,
    StopRequested,
    transition,
)

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u to misread
SUBMIT_WAITS = (0.1, 0.5)  # seconds between the tries of a submission whose connection is lost
# Built once: an idle loop asks both twice a second, and building one takes five times as long as its answer.
_ANY_OPEN = select(tables.job.c.id).where(tables.job.c.state.in_(OPEN)).limit(1)
_UNDELIVERED = select(tables.attempt).where(tables.attempt.c.delivered.is_(False))
USER_TRIES = 10  # a user's word must not lose a race against a progress of the job


class LostRace(StateError):
    """Another process changed the job since it was read: read it again and decide again."""


def new_id() -> str:
    """A job's id: "j" and 7 characters of base 32 (35 random bits)."""
    return "j" + "".join(secrets.choice(ALPHABET) for _ in range(7))


class JobStore:
    """Jobs in a database.

    Args:
        url: sqlite:///PATH or postgresql://...; created or migrated when needed.
        clock: Unix seconds.
        home: whose jobs it holds; None: for SQLite, the directory that the database is in.

    Raises as `database.open_engine`; every method, ClusterError for what the database says. A row that cannot
    be read is left out of a list, and told once; where one row is asked for, it is a StateError.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time, home: Path | None = None) -> None:
        self._engine = open_engine(url, home)
        self._clock = clock
        self._rows = RowReader()

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    # What a user does

    def submit(self, new: NewJob) -> Job:
        """Queue a job; or find the one that its idempotency key has queued before, whatever has become of it.

        So it may be repeated: one whose answer was lost with the connection is found, not doubled.
        Raises NotFoundError where `after` or `parent` names no job, SpecError where the key has another spec.
        """
        now = self._clock()
        values = asdict(new) | {
            "name": new.name or new.workload,
            "command": [*new.command],
            "after": self.get(new.after).id if new.after else None,
            "parent": self.get(new.parent).id if new.parent else None,
        }
        values |= {"submitted_at": now, "changed_at": now, "state": "queued", "message": "", "hint": ""}
        values |= {"revision": 0, "attempts": 0, "retries_used": 0, "stop_requested": False}
        values |= {"idempotency_key": new.idempotency_key or own_key(), "spec_hash": spec_hash(values)}
        for wait in SUBMIT_WAITS:
            try:
                return self._queue_once(values)
            except ClusterError:  # the connection was lost, or another process used the key first
                time.sleep(wait)
        return self._queue_once(values)

    def _queue_once(self, values: dict[str, Any]) -> Job:
        """One try of `submit`."""
        job, key = tables.job, values["idempotency_key"]
        with writing(self._engine) as connection:
            found = connection.execute(select(job).where(job.c.idempotency_key == key)).mappings().first()
            if found is not None:
                check_same(dict(found), values)
                return self._rows.one(Job, found)
            job_id = new_id()
            while connection.execute(select(job.c.id).where(job.c.id == job_id)).first():
                job_id = new_id()
            connection.execute(insert(job).values(**values, id=job_id))
            _note(connection, job_id, 0, StateChange("queued", at=values["submitted_at"]))
            return self._job(connection, job_id)

    def get(self, name: str, wanted: Sequence[State] = ALIVE) -> Job:
        """The job with this id; else the newest of this name that is in one of these states, or, where none is, the
        newest of this name; else the one whose id begins so. Raises NotFoundError.
        """
        job = tables.job.c
        newest = (job.state.in_(wanted).desc(), job.order.desc())
        for matches, most in (
            (job.id == name, 1),
            (job.name == name, 1),
            (job.id.startswith(name, autoescape=True), 6),
        ):
            query = select(tables.job).where(matches).order_by(*newest).limit(most)
            with reading(self._engine) as connection:
                found = connection.execute(query).mappings().all()
            if len(found) == 1:
                return self._rows.one(Job, found[0])
            if found:
                ids = ", ".join(str(row["id"]) for row in found[:5]) + (", ..." if len(found) > 5 else "")
                raise NotFoundError(f"{name!r} is not one job but several: {ids}", "give the id")
        raise NotFoundError(f"there is no job {name!r}", "`escala ps --all` lists the jobs")

    def request_stop(self, name: str) -> Job:
        """Stop a job: at once if queued, else it becomes `stopping`. Of several of this name, the newest that has not
        ended. Raises StateError if it has.
        """
        return self._insist(name, StopRequested(), OPEN)

    def request_retry(self, name: str) -> Job:
        """Queue a failed or stopped job again, its retries renewed. Of several of this name, the newest that failed or
        was stopped. Raises StateError for any other.
        """
        return self._insist(name, RetryRequested(), ("failed", "stopped"))

    def _insist(self, name: str, event: Event, wanted: Sequence[State]) -> Job:
        for _ in range(USER_TRIES):
            job = self.get(name, wanted)
            try:
                return self.apply(job, event)
            except LostRace:
                continue  # it moved on meanwhile: decide on what it is now
            except ClusterError:
                now = self.get(job.id)
                if (
                    now.revision == job.revision + 1
                    and now.state == transition(job.standing, event, 0.0).state
                ):
                    return now  # the answer alone was lost
                raise
        raise LostRace(f"job {name} changes too fast", "try again")

    # What the reconcile loop does

    def apply(self, job: Job, event: Event) -> Job:
        """Carry out `event` on `job` as it was read. Raises LostRace, and StateError as `transition`."""
        now = self._clock()
        decision = transition(job.standing, event, now)
        with writing(self._engine) as connection:
            _write(connection, job, decision, _more(event))
            if isinstance(event, DriverSeen):
                _update_attempt(connection, job.id, job.attempts, running_at=now)
            if decision.state == "stopping":
                _update_attempt(connection, job.id, job.attempts, stopping_at=now)
            return self._job(connection, job.id)

    def claim_start(self, job: Job) -> Attempt:
        """Start the next attempt of a queued job: its row and the state `starting` in one transaction.

        Raises LostRace where another process has changed the job since it was read.
        """
        decision = transition(job.standing, Claimed(), self._clock())
        number = job.attempts + 1
        with writing(self._engine) as connection:
            _write(connection, job, decision, {"attempts": number})
            row = {"job_id": job.id, "number": number, "claimed_at": decision.at}
            connection.execute(insert(tables.attempt).values(**row, message="", hint="", delivered=False))
            return self._attempt(connection, job.id, number)

    def finish(self, job: Job, outcome: Outcome, usage: Usage) -> Job:
        """End the job's current attempt: outcome, record, usage, the job's new state and totals, at once."""
        decision = transition(job.standing, AttemptEnded(outcome.kind, outcome.message), self._clock())
        with writing(self._engine) as connection:
            more = {"hint": outcome.hint, "retries_used": job.retries_used + decision.uses_retry}
            _write(connection, job, decision, more)
            _update_attempt(
                connection,
                job.id,
                job.attempts,
                ended_at=decision.at,
                outcome=outcome.kind,
                message=outcome.message,
                hint=outcome.hint,
                checkpoint=outcome.checkpoint,
                record=outcome.record,
                **asdict(usage),
            )
            _sum_up(connection, job.id)
            return self._job(connection, job.id)

    def record_submitted(self, attempt: Attempt) -> None:
        """The backend has the attempt."""
        with writing(self._engine) as connection:
            _update_attempt(connection, attempt.job_id, attempt.number, submitted_at=self._clock())

    def record_progress(self, attempt: Attempt, progress: Progress) -> None:
        """How far the attempt is; the job's totals follow."""
        with writing(self._engine) as connection:
            usage = asdict(Usage.of(progress, None))
            _update_attempt(connection, attempt.job_id, attempt.number, progress=asdict(progress), **usage)
            _sum_up(connection, attempt.job_id)

    def record_delivered(self, attempt: Attempt) -> None:
        """All of the attempt's tracking has reached the tracker."""
        with writing(self._engine) as connection:
            _update_attempt(connection, attempt.job_id, attempt.number, delivered=True)

    def queue(self, limit: int) -> Sequence[Job]:
        """The first `limit` queued jobs that may start (what they wait for has succeeded), in order."""
        job, other = tables.job, tables.job.alias()
        waits_for_nothing = job.c.after.is_(None) | (other.c.state == "succeeded")
        query = (
            select(job)
            .outerjoin(other, job.c.after == other.c.id)
            .where(job.c.state == "queued", waits_for_nothing)
            .order_by(job.c.priority.desc(), job.c.order)
        )
        return self._jobs(query, limit)

    def broken_dependencies(self) -> Sequence[tuple[Job, str, str]]:
        """Queued jobs whose `after` job failed, was stopped, or is in no state that there is: (job, that job's
        id, its state).
        """
        job, other = tables.job, tables.job.alias()
        ended = or_(other.c.state.in_(("failed", "stopped")), other.c.state.not_in(STATES))
        query = (
            select(job, other.c.state.label("other_state"))
            .join(other, job.c.after == other.c.id)
            .where(job.c.state == "queued", ended)
        )
        with reading(self._engine) as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        states = {row["id"]: str(row.pop("other_state")) for row in rows}
        return [(found, str(found.after), states[found.id]) for found in self._rows.all(Job, rows)]

    def undelivered(self) -> Sequence[Attempt]:
        """Attempts whose tracking is not complete at the tracker."""
        with reading(self._engine) as connection:
            return self._rows.all(Attempt, connection.execute(_UNDELIVERED).mappings())

    # What everybody reads

    def attempts(self, job_id: str) -> Sequence[Attempt]:
        """The job's attempts, the first one first."""
        table = tables.attempt
        query = select(table).where(table.c.job_id == job_id).order_by(table.c.number)
        with reading(self._engine) as connection:
            return self._rows.all(Attempt, connection.execute(query).mappings())

    def events(self, job_id: str) -> Sequence[HistoryEvent]:
        """The job's history, oldest first."""
        table = tables.event
        query = select(table).where(table.c.job_id == job_id).order_by(table.c.number)
        with reading(self._engine) as connection:
            return self._rows.all(HistoryEvent, connection.execute(query).mappings())

    def has_work(self) -> bool:
        """Whether any job is queued or at work."""
        with reading(self._engine) as connection:
            return connection.execute(_ANY_OPEN).first() is not None

    def active(self) -> Sequence[Job]:
        """Jobs with an attempt that may be at work."""
        return self.list(ACTIVE)

    def waiting(self, limit: int | None = None) -> Sequence[Job]:
        """The first `limit` queued jobs in the order in which they start, those that wait for another one too."""
        job = tables.job.c
        query = select(tables.job).where(job.state == "queued").order_by(job.priority.desc(), job.order)
        return self._jobs(query, limit)

    def list(
        self,
        states: Iterable[State] | None = None,
        limit: int | None = None,
        workload: str | None = None,
        name: str | None = None,
    ) -> Sequence[Job]:
        """Jobs in these states, of this workload and name (None: all) in submit order; with a limit, the last ones
        submitted.
        """
        job = tables.job.c
        query = select(tables.job).order_by(job.order.desc())
        if states is not None:
            query = query.where(job.state.in_(tuple(states)))
        if workload is not None:
            query = query.where(job.workload == workload)
        if name is not None:
            query = query.where(job.name == name)
        return self._jobs(query, limit)[::-1]

    def _jobs(self, query: Select[Any], limit: int | None = None) -> Sequence[Job]:
        """The first `limit` readable jobs: damaged rows take nobody's place."""
        found: list[Job] = []
        with reading(self._engine) as connection:
            if limit is None:
                return self._rows.all(Job, connection.execute(query).mappings())
            offset = 0
            while len(found) < limit:
                page = connection.execute(query.limit(limit).offset(offset)).mappings().all()
                found += self._rows.all(Job, page)
                offset += limit
                if len(page) < limit:
                    break
        return found[:limit]

    def _job(self, connection: Connection, job_id: str) -> Job:
        query = select(tables.job).where(tables.job.c.id == job_id)
        return self._rows.one(Job, connection.execute(query).mappings().one())

    def _attempt(self, connection: Connection, job_id: str, number: int) -> Attempt:
        table = tables.attempt
        query = select(table).where(table.c.job_id == job_id, table.c.number == number)
        return self._rows.one(Attempt, connection.execute(query).mappings().one())


def _more(event: Event) -> dict[str, Any]:
    match event:
        case StopRequested():
            return {"stop_requested": True}
        case RetryRequested():
            return {"stop_requested": False, "retries_used": 0, "hint": ""}
    return {}


def _write(connection: Connection, job: Job, decision: StateChange, more: dict[str, Any]) -> None:
    """The compare-and-set, and the line of history with it."""
    changes: dict[str, Any] = {
        "state": decision.state,
        "reason": decision.reason,
        "message": decision.message,
        "revision": job.revision + 1,
        "changed_at": decision.at,
    }
    same = (tables.job.c.id == job.id) & (tables.job.c.revision == job.revision)
    if connection.execute(update(tables.job).where(same).values(**changes, **more)).rowcount != 1:
        raise LostRace(f"another process changed job {job.id} at the same time", "look again and repeat")
    _note(connection, job.id, decision.attempt or job.attempts, decision)


def _note(connection: Connection, job_id: str, attempt: int, decision: StateChange) -> None:
    line = {"state": decision.state, "reason": decision.reason, "message": decision.message}
    connection.execute(insert(tables.event).values(job_id=job_id, attempt=attempt, at=decision.at, **line))


def _update_attempt(connection: Connection, job_id: str, number: int, **values: Any) -> None:
    table = tables.attempt
    this = (table.c.job_id == job_id) & (table.c.number == number)
    connection.execute(update(table).where(this).values(**values))


def _sum_up(connection: Connection, job_id: str) -> None:
    """The job's totals from its attempts; SQL's sum leaves NULLs out and is NULL where all are."""
    names = ("train_tokens", "compute_flops", "wall_seconds", "energy_joules")
    table = tables.attempt
    sums = connection.execute(
        select(*(func.sum(table.c[name]).label(name) for name in names)).where(table.c.job_id == job_id)
    ).one()
    values = dict(zip(names, sums, strict=True))
    if values["train_tokens"] is not None:  # PostgreSQL sums big integers into a Decimal
        values["train_tokens"] = min(int(values["train_tokens"]), 2**63 - 1)
    connection.execute(update(tables.job).where(tables.job.c.id == job_id).values(**values))
