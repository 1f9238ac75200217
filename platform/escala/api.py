"""What the CLI, a server and notebooks call. Reads top to bottom: cluster, jobs, runs, checkpoints, demo; laws are
in `escala.laws.service` and named here.

Everything heavy (ray, mlflow, the database) is imported by the function that needs it.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from escala import manifests, spec
from escala.errors import NotFoundError, SpecError, StateError
from escala.jobs.state import FINAL
from escala.records import AttemptFiles, JobFiles, Progress, RunRecord, Totals, read_record
from escala.settings import Settings

if TYPE_CHECKING:
    from escala.cluster import ClusterStatus
    from escala.jobs.model import Attempt, HistoryEvent, Job, NewJob
    from escala.jobs.store import JobStore
    from escala.laws.law import Allocation
    from escala.laws.service import Fitted
    from escala.sweeps.plan import Plan
    from escala.sweeps.points import SweepPoints

Report = Callable[[str], None]
POLL_SECONDS = 0.5
SWEEP, SWEEP_ENTRY = "sweep", "escala.sweeps.tuner"
LAWS = (
    "calibration",
    "compare_laws",
    "export_law",
    "fit_file",
    "law",
    "laws",
    "plan_law",
    "plot_law",
    "predict_law",
    "promote_law",
)


def __getattr__(name: str) -> Any:
    """The laws' functions, from `escala.laws.service` at their first use."""
    if name not in LAWS:
        raise AttributeError(f"module 'escala.api' has no attribute '{name}'")
    return getattr(import_module("escala.laws.service"), name)


def _silent(text: str) -> None:
    """A report that nobody reads."""


# The cluster


def up(report: Report = _silent) -> ClusterStatus:
    """Start what is missing of the embedded cluster. Raises ClusterError, naming a taken port or a dead process."""
    from escala import cluster

    return cluster.up(Settings(), report)


def down(report: Report = _silent) -> None:
    """End the processes that `up` started, and no others."""
    from escala import cluster

    cluster.down(Settings(), report)


def status() -> ClusterStatus:
    """The processes of the cluster and whether they answer."""
    from escala import cluster

    return cluster.status(Settings())


# Jobs


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


def resolve(
    workload: str,
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    compute_flops: float | None = None,
    law: str | None = None,
) -> spec.Resolved:
    """The spec in full and what it costs; starts nothing. Args and errors as `submit`."""
    return spec.resolve(_load(workload, files, overrides, options, compute_flops, law))


def submit(
    workload: str,
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    report: Report = _silent,
    compute_flops: float | None = None,
    law: str | None = None,
    base: Mapping[str, Any] | None = None,
) -> Job:
    """Check a job, bring the cluster up where none is configured, and queue the job.

    Args:
        workload, files, overrides, options: see `spec.load_job`.
        compute_flops: the one dial: model, tokens, batch and learning rate follow from it by recipe, where files and
            overrides do not fix them.
        law: whose optimum splits `compute_flops` into N and D; None: 20 tokens per parameter.
        base: a configuration to start from, instead of the defaults.

    Raises SpecError, LawError or NotFoundError before anything starts, ClusterError after that.
    """
    return _queue(_load(workload, files, overrides, options, compute_flops, law, base), report)


def _load(
    workload: str,
    files: Iterable[str | Path],
    overrides: Iterable[str],
    options: Mapping[str, Any] | None,
    compute_flops: float | None,
    law: str | None,
    base: Mapping[str, Any] | None = None,
) -> spec.JobSpec:
    if compute_flops is None:
        if law is not None:
            raise SpecError(
                f"--law {law} splits a budget, and none is given", "add --compute-flops, e.g. 1e18"
            )
        return spec.load_job(workload, files, overrides, options, base)
    from escala.sweeps.design import by_recipe

    files, overrides = list(files), list(overrides)
    written = spec.written(files, overrides, base)
    axes = {"compute_flops": compute_flops}
    if law is not None:
        from escala.laws.service import plan_law

        best = plan_law(law, compute_flops, context_tokens=_context(written)).answer
        axes["n_total"] = cast("Allocation", best).n_total
    return spec.load_job(workload, options=options, base=spec.merge(by_recipe(written, axes), written))


def _context(written: Mapping[str, Any]) -> float | None:
    """The context length that a spec states; None where it leaves it to the defaults."""
    stated: float | None = written.get("training", {}).get("context_tokens")
    return stated or written.get("model", {}).get("max_context_tokens")


def jobs(everything: bool = False, limit: int | None = None) -> Sequence[Job]:
    """Jobs that run, then those that wait in the order in which they start; with `everything`, all, newest first."""
    with _store() as store:
        if everything:
            return store.list(limit=limit)[::-1]
        waiting = sorted(store.list(("queued",)), key=lambda job: (-job.priority, job.order))
        found = [*store.active(), *waiting]
        return found[:limit] if limit is not None else found


def job(name: str) -> JobDetails:
    """One job in full. Raises NotFoundError."""
    with _store() as store:
        found = store.get(name)
        attempts = store.attempts(found.id)
        runs = [_run_id(found.id, a.number) for a in attempts]
        return JobDetails(found, found.totals, attempts, runs, store.events(found.id))


def stop(name: str) -> Job:
    """Ask a job to write a checkpoint and end. Raises NotFoundError, StateError."""
    with _store() as store:
        return store.request_stop(name)


def retry(name: str, report: Report = _silent) -> Job:
    """Queue a failed or stopped job again, its retries renewed; it continues from its last checkpoint.

    Raises NotFoundError, StateError for a job that has not failed or been stopped.
    """
    with _store() as store:
        job = store.request_retry(name)
    up(report)
    return job


def resume(name: str, overrides: Iterable[str] = (), report: Report = _silent) -> Job:
    """A new job that starts from the last good checkpoint of another one, its spec overridden.

    Raises NotFoundError where the job has no checkpoint, SpecError for a bad override.
    """
    with _store() as store:
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
    return _queue(job, report, resume_from=str(checkpoints), parent=old.id)


def logs(name: str, follow: bool = False) -> Iterator[str]:
    """The lines of a job's output, attempt after attempt; with `follow`, until it ends."""
    with _store() as store:
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
    with _store() as store:
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


def _queue(
    job: spec.JobSpec, report: Report, resume_from: str | None = None, parent: str | None = None
) -> Job:
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
    return _submit(new, report)


def _submit(new: NewJob, report: Report) -> Job:
    with _store() as store:
        queued = store.submit(new)
    up(report)
    return queued


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
    return path.read_text().strip() if path.exists() else None


class _store:
    """The job database, opened for one call."""

    def __enter__(self) -> JobStore:
        from escala.jobs.store import JobStore

        self._open = JobStore(Settings().database_url)
        return self._open

    def __exit__(self, *_: object) -> None:
        self._open.close()


# Sweeps


def plan_sweep(space: str, overrides: Iterable[str] = ()) -> Plan:
    """What a sweep would train and cost; starts nothing.

    Args:
        space: the name of one in `tune_spaces/`, or a YAML file's path.
        overrides: `a.b=value` on the space's keys.

    Raises NotFoundError, SpecError; also for a trial that the embedded head can never hold.
    """
    from escala.sweeps.plan import make_plan
    from escala.sweeps.space import load_space

    return make_plan(*load_space(space, overrides), Settings())


def sweep(
    space: str,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    resume: bool = False,
    report: Report = _silent,
) -> Job:
    """Queue a sweep; or, with `resume`, queue the last interrupted sweep of this very space again.

    Args as `plan_sweep`; `options` are fields of JobOptions. A trial that any sweep of this home has finished is not
    trained again, resumed or not. Raises as `plan_sweep`; NotFoundError where there is nothing to resume.
    """
    from escala.jobs.model import NewJob
    from escala.sweeps.space import load_space

    plan = plan_sweep(space, overrides)
    name, loaded = load_space(space, overrides)
    config = {**loaded.model_dump(mode="json"), "concurrency": plan.concurrency or loaded.concurrency}
    if resume:
        return retry(_interrupted(name, config).id, report)
    given = {"name": name, **{k: v for k, v in (options or {}).items() if v is not None}}
    checked: spec.JobOptions = spec.validate(spec.JobOptions, given, "job")
    report(f"{len(plan.trials)} trials, {plan.compute_flops:.3g} FLOPs")
    new = NewJob(
        workload=SWEEP,
        entry_point=SWEEP_ENTRY,
        config=config,
        command=tuple(sys.argv),
        experiment=Settings().experiment,
        tags={"escala.space": name},
        **checked.model_dump(),
    )
    return _submit(new, report)


def space_base(space: str) -> dict[str, Any]:
    """The configuration that a space's trials share, for a run that is to be compared with them."""
    from escala.sweeps.space import load_space

    return dict(load_space(space)[1].base)


def _interrupted(space: str, config: Mapping[str, Any]) -> Job:
    """The last sweep of this space, if it was interrupted."""
    with _store() as store:
        found = [j for j in store.list() if j.workload == SWEEP and j.tags.get("escala.space") == space]
    if not found:
        raise NotFoundError(f"no sweep of {space} has been started here", f"escala sweep {space}")
    last = found[-1]
    if last.state not in ("failed", "stopped"):
        raise StateError(
            f"the last sweep of {space}, job {last.id}, is {last.state}", "there is nothing to resume"
        )
    if last.config != config:
        raise SpecError(
            f"the space {space} is not what it was for job {last.id}",
            f"give the same --set, or start a new sweep: what is finished and still asked for is not trained "
            f"again. `escala jobs retry {last.id}` continues the old one",
        )
    return last


def sweep_points(name: str) -> SweepPoints:
    """The points of a sweep (by its job's id or name) so far, and the refused ones. Raises NotFoundError."""
    from escala.sweeps.points import read_points

    with _store() as store:
        found = store.get(name)
    if found.workload != SWEEP:
        raise NotFoundError(f"job {found.id} is a {found.workload}, not a sweep", "escala ps --all")
    return read_points(Settings().home, found.id)


def fit_sweeps(names: Sequence[str], law: str, **settings: Any) -> Fitted:
    """Fit a law to the points of one or several sweeps, and store it as the next version of `law`.

    A trial that is in several of them counts once. `settings` (form, group, size, bootstrap, seed): see
    `laws.service.fit_points`.
    Raises NotFoundError, LawError, ClusterError.
    """
    import pandas as pd

    from escala.laws import service
    from escala.sweeps.points import in_common

    found = [sweep_points(name) for name in names]
    points = pd.concat([part for each in found for part in (each.points, each.refused)])
    points = points.drop_duplicates("trial").reset_index(drop=True)
    shared = in_common([each.configuration for each in found])
    sources = [f"sweep {name}" for name in names]
    return service.fit_points(points, law, sources=sources, configuration=shared, **settings)


# Runs


def runs(
    job: str | None = None,
    workload: str | None = None,
    status: str | None = None,
    name: str | None = None,
    limit: int = 50,
) -> Sequence[RunRecord]:
    """Runs in the tracker that match all filters given, newest first.

    Raises NotFoundError for an unknown job (id or name), ClusterError where the tracker does not answer.
    """
    from escala.tracking.runs import list_runs

    if job is not None:
        with _store() as store:
            job = store.get(job).id
    settings = Settings()
    return list_runs(
        settings.tracker,
        settings.experiment,
        job_id=job,
        workload=workload,
        status=status,
        name=name,
        limit=limit,
    )


def run(name: str) -> RunRecord:
    """The run with this id (or its start), or the last run of the job with this id or name. Raises NotFoundError."""
    from escala.tracking.runs import get_run

    try:
        details = job(name)
    except NotFoundError:
        run_id = name
    else:
        run_id = next((each for each in reversed(details.runs) if each), "")
        if not run_id:
            raise NotFoundError(
                f"job {details.job.id} has no run in the tracker yet", "wait for its first step"
            )
    settings = Settings()
    return get_run(settings.tracker, settings.experiment, run_id)


def run_url(record: RunRecord) -> str:
    """The run's page in MLflow."""
    from escala.tracking.runs import run_url

    return run_url(Settings().tracker, str(record.run_id))


def compare(names: Sequence[str]) -> dict[str, list[Any]]:
    """Where the records of several runs differ: field -> a value for each run; `run_id` names the columns."""
    if len(names) < 2:
        raise SpecError("a comparison needs two runs", "escala runs compare RUN RUN")
    records = [asdict(run(name)) for name in names]
    rows = {key: [record[key] for record in records] for key in records[0]}
    return {key: values for key, values in rows.items() if key == "run_id" or len(set(map(str, values))) > 1}


# Checkpoints


@dataclass(frozen=True)
class Garbage:
    """Checkpoints that the retention rule gives up: (path, bytes)."""

    checkpoints: list[tuple[str, int]]


def collect_garbage(name: str | None = None, keep: int | None = None, delete: bool = False) -> Garbage:
    """The checkpoints beyond each job's retention rule (or beyond `keep`); freed with `delete`.

    Jobs that wait or run are left alone: their own rule works while they write.
    """
    if keep is not None and keep < 1:
        raise SpecError("--keep must be at least 1", "a job without a checkpoint cannot be resumed")
    with _store() as store:
        ended = [store.get(name)] if name else store.list(FINAL)
    home, found = Settings().home, list[tuple[str, int]]()
    for job in ended:
        if job.state not in FINAL:
            raise SpecError(f"job {job.id} is {job.state}", "its own retention rule works while it runs")
        directory = JobFiles(home, job.id).checkpoints
        rule = keep or int(job.config.get("training", {}).get("keep_checkpoints", 1))
        names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
        found += [_size(directory / n) for n in manifests.to_delete(names, rule)]
    if delete:
        for path, _ in found:
            shutil.rmtree(path)
    return Garbage(found)


def _size(directory: Path) -> tuple[str, int]:
    return str(directory), sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
