"""Runs, as `escala.client` offers them: of a job or by id, their metrics, samples, page, and where they differ.

mlflow is imported by the function that needs it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from escala.contract.errors import NotFoundError, SpecError, StateError
from escala.contract.records import SAMPLES, RunRecord
from escala.jobs.actions import POLL_SECONDS, check_limit, job, open_store
from escala.settings import Settings


def runs(
    settings: Settings,
    job: str | None = None,
    workload: str | None = None,
    status: str | None = None,
    name: str | None = None,
    limit: int = 50,
) -> Sequence[RunRecord]:
    """Runs in the tracker that match all filters given, newest first.

    Raises NotFoundError for an unknown job (id or name), SpecError for a limit that is none, ClusterError where the
    tracker does not answer.
    """
    from escala.tracking.queries import list_runs

    check_limit(limit)
    if job is not None:
        with open_store(settings) as store:
            job = store.get(job).id
    return list_runs(
        settings.tracker,
        settings.experiment,
        job_id=job,
        workload=workload,
        status=status,
        name=name,
        limit=limit,
    )


def run(settings: Settings, name: str) -> RunRecord:
    """The run with this id (or its start), or the last run of the job with this id or name. Raises NotFoundError."""
    from escala.tracking.queries import get_run

    try:
        details = job(settings, name)
    except NotFoundError:
        run_id = name
    else:
        run_id = next((each for each in reversed(details.runs) if each), "")
        if not run_id:
            raise NotFoundError(
                f"job {details.job.id} has no run in the tracker yet", "wait for its first step"
            )
    return get_run(settings.tracker, settings.experiment, run_id)


def finished_run(settings: Settings, name: str, wait_seconds: float = 120.0) -> RunRecord:
    """The last run of a job that has ended, as soon as the tracker has all of it: records and metrics are delivered
    from a spool, after the job's end.

    Raises NotFoundError, and StateError where the delivery takes longer than `wait_seconds`.
    """
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        details = job(settings, name)
        if details.attempts and all(attempt.delivered for attempt in details.attempts):
            return run(settings, name)
        time.sleep(POLL_SECONDS)
    raise StateError(
        f"the run of job {name} is not whole in the tracker after {wait_seconds:g} s",
        "`escala status` says whether the tracker answers; the run stays in its spool until it does",
    )


def history(settings: Settings, record: RunRecord, metric: str) -> list[tuple[int, float]]:
    """(step, value) of each point of a run's metric, by step; empty for one that it has not."""
    from escala.tracking.queries import metric_history

    return metric_history(settings.tracker, str(record.run_id), metric)


def samples(settings: Settings, record: RunRecord, last: int | None = None) -> list[dict[str, Any]]:
    """What a policy said in a `ppo` run: iteration, prompt, response, reward, finished; the newest `last`, None: all.

    Raises NotFoundError, and SpecError for a `last` that is no number of rows.
    """
    from escala.tracking.queries import read_table

    hint = "only `ppo` stores samples, and its first after an iteration"
    check_limit(last, "--last")
    found = read_table(settings.tracker, str(record.run_id), SAMPLES, hint)
    return found if last is None else found[-last:]


def run_url(settings: Settings, record: RunRecord) -> str:
    """The run's page in MLflow."""
    from escala.tracking.queries import run_url

    return run_url(settings.tracker, str(record.run_id))


def page(settings: Settings, record: RunRecord) -> str | None:
    """`run_url` of a record that was read just now; None where the tracker has no pages."""
    try:
        return run_url(settings, record)
    except NotFoundError:
        return None


def compare(settings: Settings, names: Sequence[str]) -> dict[str, list[Any]]:
    """Where the records of several runs differ: field -> a value for each run; `run_id` names the columns."""
    if len(names) < 2:
        raise SpecError("a comparison needs two runs", "escala runs compare RUN RUN")
    records = [asdict(run(settings, name)) for name in names]
    rows = {key: [record[key] for record in records] for key in records[0]}
    return {key: values for key, values in rows.items() if key == "run_id" or len(set(map(str, values))) > 1}
