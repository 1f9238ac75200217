"""Jobs, as `escala.api` offers them: queue, look, stop, retry, resume, follow.

Everything heavy (ray, the database) is imported by the function that needs it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from escala import manifests, spec
from escala.errors import NotFoundError, SpecError, StateError
from escala.hardware import load_cluster
from escala.jobs.state import FINAL
from escala.records import AttemptFiles, JobFiles, Progress, Totals, read_record
from escala.settings import Settings

if TYPE_CHECKING:
    from escala.jobs.model import Attempt, HistoryEvent, Job, NewJob
    from escala.jobs.store import JobStore

Report = Callable[[str], None]
POLL_SECONDS = 0.5
RATES_TAG = "escala.rates"  # what workloads/training/energy.py reads
SWEEP = "sweep"  # the workload of a sweep's job


def silent(text: str) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True)
class JobDetails:
    """A job with its attempts and its history. `runs`: the MLflow run of each attempt, None until it is delivered."""

    job: Job
    totals: Totals
    attempts: Sequence[Attempt]
    runs: Sequence[str | None]
    events: Sequence[HistoryEvent]


@dataclass(frozen=True)
class Watched:
    """A job at one moment: its row, its attempt's progress, and what it does while there is none yet."""

    job: Job
    progress: Progress | None
    doing: str


def jobs(everything: bool = False, limit: int | None = None) -> Sequence[Job]:
    """Jobs that run, then those that wait in the order in which they start; with `everything`, all, newest first."""
    with open_store() as store:
        if everything:
            return store.list(limit=limit)[::-1]
        waiting = sorted(store.list(("queued",)), key=lambda job: (-job.priority, job.order))
        found = [*store.active(), *waiting]
        return found[:limit] if limit is not None else found


def job(name: str) -> JobDetails:
    """One job in full. Raises NotFoundError."""
    with open_store() as store:
        found = store.get(name)
        attempts = store.attempts(found.id)
        runs = [_run_id(found.id, a.number) for a in attempts]
        return JobDetails(found, found.totals, attempts, runs, store.events(found.id))


def stop(name: str) -> Job:
    """Ask a job to write a checkpoint and end. Raises NotFoundError, StateError."""
    with open_store() as store:
        return store.request_stop(name)


def retry(name: str, report: Report = silent) -> Job:
    """Queue a failed or stopped job again, its retries renewed; it continues from its last checkpoint.

    Raises NotFoundError, StateError for a job that has not failed or been stopped.
    """
    with open_store() as store:
        job = store.request_retry(name)
    _up(report)
    return job


def resume(name: str, overrides: Iterable[str] = (), report: Report = silent) -> Job:
    """A new job that starts from the last good checkpoint of another one, its spec overridden.

    Raises NotFoundError where the job has no checkpoint, SpecError for a bad override.
    """
    with open_store() as store:
        old = store.get(name)
    if old.workload == SWEEP:
        hint = f"escala sweep {old.tags['escala.space']} --resume, or escala jobs retry {old.id}"
        raise StateError(f"job {old.id} is a sweep, which has no checkpoint of its own", hint)
    checkpoints = JobFiles(Settings().home, old.id).checkpoints
    if manifests.latest(checkpoints)[0] is None:
        raise NotFoundError(
            f"job {old.id} has no good checkpoint in {checkpoints}", "`escala jobs retry` starts it again"
        )
    options = {"name": old.name, "priority": old.priority, "retries": old.retries}
    job = spec.load_job(old.workload, (), overrides, options, base=old.config)
    return start(job, report, resume_from=str(checkpoints), parent=old.id)


def logs(name: str, follow: bool = False) -> Iterator[str]:
    """The lines of a job's output, attempt after attempt; with `follow`, until it ends."""
    with open_store() as store:
        job_id, number = store.get(name).id, 1
        while True:
            job = store.get(job_id)
            path = _files(job_id, number).log
            if path.exists():
                yield from _lines(path, partial(_at_work, store, job_id, number) if follow else lambda: False)
            if number < job.attempts:
                number += 1
            elif not follow or job.state in FINAL:
                return
            else:
                time.sleep(POLL_SECONDS)
                number += path.exists() and store.get(job_id).attempts > number


def watch(name: str) -> Iterator[Watched]:
    """The job's state and progress, again and again, until it has ended; the last item is the final state."""
    with open_store() as store:
        job_id = store.get(name).id
        while True:
            job = store.get(job_id)
            files = _files(job_id, max(1, job.attempts))
            progress = read_record(Progress, files.progress) if job.attempts else None
            yield Watched(job, progress, _doing(job, files))
            if job.state in FINAL:
                return
            time.sleep(POLL_SECONDS)


def _check_room(job: spec.JobSpec) -> None:
    """Refuse what the embedded head can never start: Ray would wait for ever. An existing cluster may grow."""
    settings, resources = Settings(), job.config.resources
    cpus = resources.workers * resources.cpus_per_worker
    if settings.ray_address is None and cpus > settings.num_cpus:
        raise SpecError(
            f"{resources.workers} workers x {resources.cpus_per_worker:g} CPUs are {cpus:g} CPUs; the embedded head "
            f"has {settings.num_cpus}",
            "lower resources.workers or resources.cpus_per_worker, or raise ESCALA_NUM_CPUS (logical CPUs)",
        )


def start(
    job: spec.JobSpec, report: Report, resume_from: str | None = None, parent: str | None = None
) -> Job:
    """Queue a checked job. Raises SpecError for one that the embedded head can never hold, ClusterError."""
    from escala.jobs.model import NewJob

    _check_room(job)
    options = job.options
    new = NewJob(
        workload=job.workload,
        entry_point=job.entry_point,
        config=job.plain(),
        name=options.name,
        command=tuple(sys.argv),
        priority=options.priority,
        retries=options.retries,
        after=options.after,
        max_flops=options.max_flops,
        max_seconds=options.max_seconds,
        resume_from=resume_from,
        parent=parent,
        experiment=Settings().experiment,
    )
    return enqueue(new, report)


def enqueue(new: NewJob, report: Report) -> Job:
    """Store a job, and bring the cluster up where none is configured.

    Raises ClusterError; SpecError, NotFoundError for the cluster's file (ESCALA_CLUSTER), whose prices and energy it
    takes along.
    """
    rates = json.dumps(asdict(load_cluster(Settings().cluster).rates()), sort_keys=True)
    with open_store() as store:
        queued = store.submit(replace(new, tags={**new.tags, RATES_TAG: rates}))
    _up(report)
    return queued


def _up(report: Report) -> None:
    from escala import cluster

    cluster.up(Settings(), report)


def _doing(job: Job, files: AttemptFiles) -> str:
    """What a job without progress does, from the last line of its log."""
    if job.state == "queued":
        return "waits for a free slot" if not job.after else f"waits for a free slot, or for {job.after}"
    if not files.log.exists():
        return "starts"
    with files.log.open("rb") as stream:
        stream.seek(max(0, files.log.stat().st_size - 2000))
        lines = stream.read().decode(errors="replace").splitlines()
    return lines[-1][:100] if lines else "starts"


def _at_work(store: JobStore, job_id: str, number: int) -> bool:
    job = store.get(job_id)
    return job.attempts == number and job.state not in (*FINAL, "queued")


def _lines(path: Path, more_may_come: Callable[[], bool]) -> Iterator[str]:
    """Lines as they are written, until no more may come."""
    with path.open(errors="replace") as stream:
        while True:
            working = more_may_come()  # asked before the read, so that the last lines are not missed
            for line in stream:
                yield line.rstrip("\n")
            if not working:
                return
            time.sleep(POLL_SECONDS)


def _files(job_id: str, attempt: int) -> AttemptFiles:
    return JobFiles(Settings().home, job_id).attempt(attempt)


def _run_id(job_id: str, attempt: int) -> str | None:
    path = _files(job_id, attempt).spool / "run_id"
    return (path.read_text(errors="replace").strip() or None) if path.exists() else None


class open_store:
    """The job database, opened for one call."""

    def __enter__(self) -> JobStore:
        from escala.jobs.store import JobStore

        settings = Settings()
        self._open = JobStore(settings.database_url, home=settings.home)
        return self._open

    def __exit__(self, *_: object) -> None:
        self._open.close()
