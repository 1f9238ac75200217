"""Jobs, as `escala.client` offers them: queue, look, stop, retry, resume, follow.

Everything heavy (ray, the database) is imported by the function that needs it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from escala import spec
from escala.contract.errors import ClusterError, EscalaError, NotFoundError, SpecError, StateError
from escala.contract.records import AttemptFiles, JobFiles, Progress, Totals, read_record
from escala.contract.redaction import hide, hide_arguments
from escala.hardware import load_cluster
from escala.jobs.records import CHOSEN_TAG, RATES_TAG
from escala.jobs.state import FINAL
from escala.report import Report, silent
from escala.schema.workloads import get_workload
from escala.settings import Settings
from escala.storage import user_code
from escala.storage.checkpoints import newest, open_checkpoints

if TYPE_CHECKING:
    from escala.jobs.records import Attempt, HistoryEvent, Job, NewJob
    from escala.jobs.store import JobStore

log = logging.getLogger("escala.jobs")
POLL_SECONDS = 0.5
MOST_ROWS = 1_000_000  # of a list that a person or a program asks for
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # Ray writes them into a log too


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


def jobs(settings: Settings, everything: bool = False, limit: int | None = None) -> Sequence[Job]:
    """Jobs that run, then those that wait in the order in which they start; with `everything`, all, newest first.

    At most `limit` of them, and no more is read. Raises SpecError for a limit that is none.
    """
    check_limit(limit)
    with open_store(settings) as store:
        if everything:
            return store.list(limit=limit)[::-1]
        return [*store.active(), *store.waiting(limit)][:limit]


def check_limit(limit: int | None, name: str = "--limit") -> None:
    """Raise SpecError for a number of rows that cannot be listed; None is all of them."""
    if limit is not None and not 1 <= limit <= MOST_ROWS:
        raise SpecError(f"{name} is {limit}", f"give a number from 1 to {MOST_ROWS:,}")


def job(settings: Settings, name: str) -> JobDetails:
    """One job in full. Raises NotFoundError."""
    with open_store(settings) as store:
        found = store.get(name)
        attempts = store.attempts(found.id)
        runs = [_run_id(settings.home, found.id, a.number) for a in attempts]
        return JobDetails(found, found.totals, attempts, runs, store.events(found.id))


def stop(settings: Settings, name: str) -> Job:
    """Ask a job to write a checkpoint and end. Raises NotFoundError, StateError."""
    with open_store(settings) as store:
        return store.request_stop(name)


def retry(settings: Settings, name: str, report: Report = silent) -> Job:
    """Queue a failed or stopped job again, its retries renewed; it continues from its last checkpoint.

    Raises NotFoundError, StateError for a job that has not failed or been stopped. A cluster that cannot be brought up:
    see `enqueue`.
    """
    with open_store(settings) as store:
        job = store.request_retry(name)
    _up_for(settings, job, report)
    return job


def resume(
    settings: Settings,
    name: str,
    overrides: Iterable[str] = (),
    report: Report = silent,
    idempotency_key: str | None = None,
) -> Job:
    """A new job that starts from the last good checkpoint of another one, its spec overridden.

    Raises NotFoundError where the job has no checkpoint, CheckpointError where none of those that it has is good,
    SpecError for a bad override. A repeated key: see `enqueue`.
    """
    with open_store(settings) as store:
        old = store.get(name)
    if get_workload(old.workload).result == "points":
        hint = f"escala sweep {old.tags['escala.space']} --resume, or escala jobs retry {old.id}"
        raise StateError(f"job {old.id} is a {old.workload}, which has no checkpoint of its own", hint)
    checkpoints = open_checkpoints(JobFiles(settings.home, old.id).checkpoints)
    if newest(checkpoints)[0] is None:
        raise NotFoundError(
            f"job {old.id} has no good checkpoint in {checkpoints.address}",
            "`escala jobs retry` starts it again",
        )
    options = {"name": old.name, "priority": old.priority, "retries": old.retries}
    options["idempotency_key"] = idempotency_key
    chosen = {k.removeprefix(CHOSEN_TAG): v for k, v in old.tags.items() if k.startswith(CHOSEN_TAG)}
    job = replace(spec.load_job(old.workload, (), overrides, options, base=old.config), chosen=chosen)
    return start(
        settings,
        job,
        report,
        resume_from=checkpoints.address,
        parent=old.id,
        code=old.tags.get(user_code.TAG),
    )


def logs(settings: Settings, name: str, follow: bool = False) -> Iterator[str]:
    """The lines of a job's output, attempt after attempt; with `follow`, until it ends."""
    with open_store(settings) as store:
        job_id, number = store.get(name).id, 1
        while True:
            job = store.get(job_id)
            path = _files(settings.home, job_id, number).log
            if path.exists():
                yield from _lines(path, partial(_at_work, store, job_id, number) if follow else lambda: False)
            if number < job.attempts:
                number += 1
            elif not follow or job.state in FINAL:
                return
            else:
                time.sleep(POLL_SECONDS)
                number += path.exists() and store.get(job_id).attempts > number


def watch(settings: Settings, name: str) -> Iterator[Watched]:
    """The job's state and progress, again and again, until it has ended; the last item is the final state.

    Raises NotFoundError, and ClusterError where nothing runs that would start the job.
    """
    with open_store(settings) as store:
        found = store.get(name)
        job_id = found.id
        if found.state not in FINAL:
            _check_served(settings, found)
        while True:
            job = store.get(job_id)
            files = _files(settings.home, job_id, max(1, job.attempts))
            progress = read_record(Progress, files.progress) if job.attempts else None
            yield Watched(job, progress, _doing(job, files))
            if job.state in FINAL:
                return
            time.sleep(POLL_SECONDS)


def _check_room(settings: Settings, job: spec.JobSpec) -> None:
    """Refuse what the embedded head can never start: Ray would wait forever. An existing cluster may grow."""
    kind, config = job.kind, job.plain()
    workers, sidecar = kind.worker_needs(config)["CPU"], kind.sidecar_needs(config)["CPU"]
    if settings.ray_address is None and workers + sidecar > settings.num_cpus:
        resources = config["resources"]
        service, key = "", ""
        if kind.sidecar is not None:
            service, key = f" and {sidecar:g} of {kind.sidecar.name}", f" or {kind.sidecar.cpus_key}"
        raise SpecError(
            f"{resources['workers']} workers x {resources['cpus_per_worker']:g} CPUs{service} are "
            f"{workers + sidecar:g} CPUs; the embedded head has {settings.num_cpus}",
            f"lower resources.workers or resources.cpus_per_worker{key}, or raise ESCALA_NUM_CPUS (logical CPUs)",
        )


def start(
    settings: Settings,
    job: spec.JobSpec,
    report: Report,
    resume_from: str | None = None,
    parent: str | None = None,
    code: str | None = None,
) -> Job:
    """Queue a checked job. Raises SpecError for one that the embedded head can never hold; and as `enqueue`.

    Args:
        code: the digest of the copy of the user's modules (escala.storage.user_code).
    """
    from escala.jobs.records import NewJob

    _check_room(settings, job)
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
        experiment=settings.experiment,
        tags=chosen_tags(job.chosen) | ({user_code.TAG: code} if code else {}),
        idempotency_key=options.idempotency_key,
    )
    return enqueue(settings, new, report)


def chosen_tags(chosen: Mapping[str, str]) -> dict[str, str]:
    """What was chosen, as tags of the job and its runs."""
    return {f"{CHOSEN_TAG}{key}": why for key, why in chosen.items()}


def enqueue(settings: Settings, new: NewJob, report: Report) -> Job:
    """Store a job, and bring the cluster up where none is configured. Returns the job that `new.idempotency_key` has
    queued before, where it has.

    What is raised, was raised before anything was queued: ClusterError for a job database that does not answer;
    SpecError, NotFoundError for the cluster's file (ESCALA_CLUSTER), whose prices and energy the job takes along;
    SpecError where the key has queued another spec. A job that is queued stays so: where the cluster cannot be brought
    up, a warning in the log of `escala.jobs` says why, and what to do.
    """
    rates = json.dumps(asdict(load_cluster(settings.cluster).rates()), sort_keys=True)
    with open_store(settings) as store:
        shown = hide_arguments(new.command)
        queued = store.submit(replace(new, command=shown, tags={**new.tags, RATES_TAG: rates}))
    _up_for(settings, queued, report)
    return queued


def _up_for(settings: Settings, job: Job, report: Report) -> None:
    """Bring the cluster up for a job that is queued, and say its id first: whatever happens now, it is known."""
    from escala import cluster

    if job.state in FINAL:  # found by its key
        return
    report(f"job {job.id} is {job.state}")
    try:
        cluster.up(settings, report)
    except (EscalaError, OSError) as error:
        message, hint = (error.message, error.hint) if isinstance(error, EscalaError) else (str(error), "")
        log.warning(
            "job %s is queued, but the cluster cannot be brought up: %s\n%sit starts once `escala up` has succeeded; "
            "do not submit it again",
            job.id,
            message.rstrip(),
            f"{hint}; " if hint else "",
        )
    except BaseException:  # Ctrl-C above all
        log.warning("job %s is queued; it starts once `escala up` has succeeded", job.id)
        raise


def _check_served(settings: Settings, job: Job) -> None:
    """Raise ClusterError where no reconcile loop runs: the job would be followed forever."""
    from escala.processes import Processes

    if Processes(settings.home).alive("runner") is None:
        raise ClusterError(
            f"job {job.id} is {job.state}, and cannot be followed: the cluster's reconcile loop does not run",
            f"`escala up`, then `escala logs -f {job.id}`",
        )


def _doing(job: Job, files: AttemptFiles) -> str:
    """What a job without progress does, from the last line of its log that says something."""
    if job.state == "queued":
        return "waits for a free slot" if not job.after else f"waits for a free slot, or for {job.after}"
    if not files.log.exists():
        return "starts"
    with files.log.open("rb") as stream:
        stream.seek(max(0, files.log.stat().st_size - 2000))
        lines = _COLOURS.sub("", stream.read().decode(errors="replace")).splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return hide(said)[:100] or "starts"


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


def _files(home: Path, job_id: str, attempt: int) -> AttemptFiles:
    return JobFiles(home, job_id).attempt(attempt)


def _run_id(home: Path, job_id: str, attempt: int) -> str | None:
    path = _files(home, job_id, attempt).spool / "run_id"
    return (path.read_text(errors="replace").strip() or None) if path.exists() else None


@contextmanager
def open_store(settings: Settings) -> Iterator[JobStore]:
    """The job database, opened for one call. Raises ClusterError where it does not answer."""
    from escala.jobs.store import JobStore

    store = JobStore(settings.database_url, home=settings.home)
    try:
        yield store
    finally:
        store.close()
