"""Reading runs back as RunRecords: from the tag `escala.record`, or, of a run that has none yet, from its
start tags.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from escala.contract.errors import EscalaError, NotFoundError, VersionError
from escala.contract.records import RunRecord, check_format
from escala.tracking.children import PARENT_TAG
from escala.tracking.mlflow_tracker import joined_tag, open_client, tracker_error
from escala.tracking.pages import run_page

log = logging.getLogger("escala.tracking")
RECORD_TAG = "escala.record"
PAGE = 500
FILTERS = {"job_id": "escala.job_id", "workload": "escala.workload", "name": "escala.name"}
_KNOWN = {field.name for field in fields(RunRecord)}


def list_runs(
    uri: str,
    experiment: str | None = None,
    *,
    job_id: str | None = None,
    workload: str | None = None,
    status: str | None = None,
    name: str | None = None,
    limit: int = 50,
) -> list[RunRecord]:
    """The newest `limit` runs that match every filter given, newest first; `experiment` None: all
    experiments.

    Raises ClusterError where the tracker does not answer.
    """
    wanted = {"job_id": job_id, "workload": workload, "name": name}
    terms = [
        f"tags.`{tag}` = '{_checked(value)}'"
        for key, tag in FILTERS.items()
        if (value := wanted[key]) is not None
    ]
    found: list[RunRecord] = []
    with _explained(uri):
        for run in _pages(open_client(uri), experiment, " and ".join(terms), PAGE if status else limit):
            record = _record(run)
            if status is None or record.status == status:
                found.append(record)
            if len(found) >= limit:
                break
    return found


def get_run(uri: str, experiment: str | None, name: str) -> RunRecord:
    """The run whose id is, or alone begins with, `name`. Raises NotFoundError, ClusterError."""
    with _explained(uri):
        client = open_client(uri)
        matches = [run for run in _pages(client, experiment, "", None) if run.info.run_id.startswith(name)]
    if not name or not matches:
        raise NotFoundError(f"there is no run {name!r} in the tracker", "`escala runs list` shows them")
    if len(matches) > 1:
        ids = ", ".join(run.info.run_id for run in matches[:5])
        raise NotFoundError(f"{len(matches)} runs begin with {name!r}: {ids}", "give more of the id")
    return _record(matches[0])


def run_url(uri: str, run_id: str) -> str:
    """The run's page. Raises ClusterError; NotFoundError for an unknown run or a tracker without pages."""
    if not uri.startswith(("http://", "https://")):
        raise NotFoundError(
            f"the tracker at {uri} is a database, and has no pages", "start `mlflow server` on it"
        )
    from mlflow.exceptions import MlflowException

    with _explained(uri):
        try:
            run = open_client(uri).get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise NotFoundError(f"there is no run {run_id!r} in the tracker", "`escala runs list`") from error
    return run_page(uri, run.info.experiment_id, run_id)


def metric_history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of each point, by step; empty for a metric that the run has not. Raises ClusterError."""
    with _explained(uri):
        points = open_client(uri).get_metric_history(run_id, metric)
    return sorted((point.step, point.value) for point in points)


def read_table(uri: str, run_id: str, path: str, hint: str) -> list[dict[str, Any]]:
    """The rows of a table that the run stored as the artifact `path`. Raises ClusterError, and NotFoundError with this
    hint where there is none.
    """
    with _explained(uri), tempfile.TemporaryDirectory() as directory:
        client = open_client(uri)
        if path not in {found.path for found in client.list_artifacts(run_id)}:
            raise NotFoundError(f"run {run_id} has no {path}", hint)
        table = json.loads(Path(client.download_artifacts(run_id, path, directory)).read_text("utf-8"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


class _explained:
    """What the tracker's client raises, as a ClusterError that names the tracker."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, EscalaError):
            raise tracker_error(self._uri, error) from error


def _pages(client: Any, experiment: str | None, terms: str, limit: int | None) -> Iterator[Any]:
    """Runs, newest first, a page at a time."""
    if experiment is not None:
        one = client.get_experiment_by_name(experiment)
        ids = [one.experiment_id] if one else []
    else:
        ids = [each.experiment_id for each in client.search_experiments(max_results=1000)]
    token = None
    while ids:
        size = min(limit or PAGE, PAGE)
        page = client.search_runs(
            ids, terms, max_results=size, order_by=["start_time DESC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _record(run: Any) -> RunRecord:
    tags: Mapping[str, str] = run.data.tags
    written = joined_tag(tags, RECORD_TAG)
    if written is not None:
        try:
            plain = json.loads(written)
            check_format(plain, f"the record of run {run.info.run_id}")
            known = {k: v for k, v in plain.items() if k in _KNOWN}
            parent = tags.get(PARENT_TAG, known.get("parent_run_id"))
            return replace(RunRecord(**known), run_id=run.info.run_id, parent_run_id=parent)
        except (VersionError, ValueError, TypeError, AttributeError) as error:  # a person may write tags
            log.warning("run %s has no usable record, and is shown without it: %s", run.info.run_id, error)
    attempt = tags.get("escala.attempt", "")
    ended = run.info.end_time
    fingerprints: dict[str, Any] = {
        key: tags[f"escala.{key}"]
        for key in _KNOWN
        if key.endswith("_fingerprint") and f"escala.{key}" in tags
    }
    return RunRecord(
        run_id=run.info.run_id,
        job_id=tags.get("escala.job_id", ""),
        attempt=int(attempt) if attempt.isdecimal() else 0,
        name=tags.get("escala.name", run.info.run_name or ""),
        workload=tags.get("escala.workload", ""),
        status=run.info.status.lower(),  # or "failed", "killed" where its writer was killed
        parent_run_id=tags.get(PARENT_TAG),
        started_at=run.info.start_time / 1000,
        ended_at=ended / 1000 if ended else None,
        **fingerprints,
    )


def _checked(value: str) -> str:
    if "'" in value:
        raise NotFoundError(f"no run has {value!r}: a name holds no quote", "`escala runs list` shows all")
    return value
