"""Runs in MLflow, by explicit run ids: the fluent API's one global run breaks where several runs share a
process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from escala.contract.errors import ClusterError, EscalaError, SpecError
from escala.contract.redaction import hide, hide_in
from escala.tracking.base import Dataset, Lifecycle, Metric
from escala.tracking.sending import is_away

KEY_TAG = "escala.key"
EXPERIMENT_TAGS = {
    "mlflow.note.content": "Runs of escala: each is one attempt of a job (`escala ps`); trials stand under their "
    "sweep. Each run's own page has a note: what ran, what came of it, how to go on.",
}
DIGEST_CHARACTERS = 16  # of a data set, enough to tell any two apart; MLflow takes 36
CONTEXT_TAG = "mlflow.data.context"
KINDS = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
METRICS, PARAMS, TAGS = 1000, 100, 100  # MLflow's limits of one log_batch call
PARAM_CHARACTERS, TAG_CHARACTERS, KEY_CHARACTERS = 6000, 8000, 250
# An absent server is an error within seconds, not after MLflow's default of seven retries in four minutes.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it has a thread, and changes the environment under its readers
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # or `finish` writes into our --json
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def open_client(uri: str) -> Any:
    """An MlflowClient on `uri` that does not wait long. Variables that the user has set go first. Raises
    SpecError for an address of an unknown kind.
    """
    if uri.partition(":")[0].partition("+")[0] not in KINDS:
        raise SpecError(
            f"{uri!r} is no tracker's address", f"it begins with one of {', '.join(KINDS)}, spool"
        )
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def tracker_error(uri: str, error: Exception) -> EscalaError:
    """What a user reads when a call to MLflow failed."""
    if is_away(error):
        return ClusterError(
            f"the tracker at {uri} does not answer", "`escala status`; `escala up` restarts it"
        )
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ClusterError(f"the tracker at {uri} failed: {said}", "`escala status`; `escala up` restarts it")


class MlflowTracker:
    """See Tracker. Raises what MLflow raises: MlflowException or requests' errors."""

    def __init__(self, uri: str) -> None:
        self._client = open_client(uri)

    def start(
        self,
        key: str,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        time_ms: int | None = None,
    ) -> str:
        """See Tracker. One writer per key: two processes that start one key at once could open it twice."""
        experiment_id = self._experiment(experiment)
        found = self._client.search_runs(
            [experiment_id], f"tags.`{KEY_TAG}` = '{_quoted(key)}'", max_results=1
        )
        if found:
            run_id = str(found[0].info.run_id)
        else:
            # The key goes in with the run, so that a kill after this call leaves a run that is found again.
            created = self._client.create_run(
                experiment_id, start_time=time_ms, tags={KEY_TAG: key}, run_name=name
            )
            run_id = str(created.info.run_id)
        self._params(run_id, params)
        self.tags(run_id, tags)
        return run_id

    def metrics(self, run_id: str, metrics: Iterable[Metric]) -> None:
        """See Tracker."""
        from mlflow.entities import Metric as Point

        points = (Point(m.key, float(m.value), m.time_ms, m.step) for m in metrics)
        while batch := list(islice(points, METRICS)):
            self._client.log_batch(run_id, metrics=batch)

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """See Tracker. A value over MLflow's limit goes in parts (`joined_tag` puts them together again)."""
        from mlflow.entities import RunTag

        flat = (RunTag(k, v) for key, value in tags.items() for k, v in split_tag(key, hide(value)))
        while batch := list(islice(flat, TAGS)):
            self._client.log_batch(run_id, tags=batch)

    def dataset(self, run_id: str, dataset: Dataset) -> None:
        """See Tracker."""
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        entity = Entity(
            name=dataset.name[:KEY_CHARACTERS],
            digest=dataset.digest[:DIGEST_CHARACTERS],
            source_type="escala",
            source=json.dumps(hide_in(dataset.source), sort_keys=True),
            profile=json.dumps(dataset.profile, sort_keys=True),
        )
        given = DatasetInput(entity, [InputTag(CONTEXT_TAG, dataset.context)])
        self._client.log_inputs(run_id, datasets=[given])

    def text(self, run_id: str, path: str, content: str) -> None:
        """See Tracker."""
        self._client.log_text(run_id, content, path)

    def finish(self, run_id: str, status: str, time_ms: int | None = None) -> None:
        """See Tracker."""
        self._client.set_terminated(run_id, status=status, end_time=time_ms)

    def drain(self) -> None:
        """See Tracker. MLflow has all when a call returns."""

    def lifecycle(self, run_id: str) -> Lifecycle:
        """See Tracker."""
        from mlflow.exceptions import MlflowException

        try:
            stage = self._client.get_run(run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return "absent"
        return "active" if stage == "active" else "deleted"

    def _params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Parameters cannot be changed; the same ones again are no error. Longer ones end in an ellipsis."""
        from mlflow.entities import Param

        flat = (
            Param(k[:KEY_CHARACTERS], v if len(v) <= PARAM_CHARACTERS else v[: PARAM_CHARACTERS - 1] + "…")
            for k, v in ((key, _hidden(key, value)) for key, value in params.items())
        )
        while batch := list(islice(flat, PARAMS)):
            self._client.log_batch(run_id, params=batch)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, tags=EXPERIMENT_TAGS))
            except MlflowException:  # another process has made it meanwhile
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        for key, value in EXPERIMENT_TAGS.items():
            if key not in found.tags:  # one that somebody else has made
                self._client.set_experiment_tag(found.experiment_id, key, value)
        return str(found.experiment_id)


def split_tag(key: str, value: str) -> Iterable[tuple[str, str]]:
    """(key, value) as MLflow takes it: parts `key`, `key.1`, `key.2`, ... of at most TAG_CHARACTERS. An empty
    part closes the list, since an earlier, longer value may have left more.
    """
    parts = max(1, math.ceil(len(value) / TAG_CHARACTERS))
    for number in range(parts):
        part = value[number * TAG_CHARACTERS : (number + 1) * TAG_CHARACTERS]
        yield (key if number == 0 else f"{key}.{number}"), part
    if len(value) >= TAG_CHARACTERS:
        yield f"{key}.{parts}", ""


def joined_tag(tags: Mapping[str, str], key: str) -> str | None:
    """The value that `split_tag` took apart; None where there is none."""
    value = tags.get(key)
    number = 1
    while value is not None and len(value) == number * TAG_CHARACTERS and tags.get(f"{key}.{number}"):
        value += tags[f"{key}.{number}"]
        number += 1
    return value


def _hidden(key: str, value: str) -> str:
    return str(hide_in({key.rpartition(".")[2]: value}).popitem()[1])


def _quoted(text: str) -> str:
    if "'" in text:
        raise ValueError(f"a run's key must not contain a quote: {text!r}")
    return text
