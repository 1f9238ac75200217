"""What is asked of an MLflow server (3.17) without its client, whose import takes seconds and 140 MB: addresses of its
pages, for people; whether runs are running.

An experiment's own address opens on traces, of which training has none; so the table of its runs is linked, in the view
for training (`workflowType`). Addresses hold no password.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from typing import Any

from escala import http_client

VIEW = "workflowType=machine_learning"
ANSWER_SECONDS = 3.0


def run_page(uri: str, experiment_id: str, run_id: str) -> str:
    """The page of a run: its note, metrics, parameters, data set, and its children."""
    return f"{shown(uri)}/#/experiments/{experiment_id}/runs/{run_id}?{VIEW}"


def runs_page(uri: str, experiment_id: str) -> str:
    """The table of an experiment's runs, children under their parents."""
    return f"{shown(uri)}/#/experiments/{experiment_id}/runs?{VIEW}"


def table_beside(page: str) -> str:
    """The table of runs in which the run of a `run_page` stands."""
    return f"{page.partition('/runs/')[0]}/runs?{VIEW}"


def find_runs_page(uri: str, experiment: str) -> str | None:
    """The table of the runs of an experiment, by its name; None where the tracker has no pages, no such experiment yet,
    or does not answer.
    """
    try:
        experiment_id = _experiment_id(uri, experiment)
    except (OSError, ValueError, KeyError, TypeError):  # a link less
        return None
    return runs_page(uri, experiment_id) if experiment_id else None


def has_running_run(uri: str, experiment: str, tag: str, prefix: str) -> bool | None:
    """Whether a run of an experiment is RUNNING whose `tag` begins with `prefix`; None where the tracker does not say:
    it is a database, or refuses the question. Raises OSError where it does not answer.
    """
    if not _has_interface(uri):
        return None
    wanted = f"attributes.status = 'RUNNING' and tags.`{tag}` LIKE '{prefix}%'"
    try:
        experiment_id = _experiment_id(uri, experiment)
        if experiment_id is None:
            return False
        asked = {"experiment_ids": [experiment_id], "filter": wanted, "max_results": 1}
        found = _ask(uri, "runs/search", asked)
        return bool(found.json().get("runs")) if found.succeeded else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _experiment_id(uri: str, experiment: str) -> str | None:
    """None where there is no such experiment. Raises OSError for no answer, ValueError, KeyError, TypeError for another
    one than MLflow's.
    """
    if not _has_interface(uri):
        return None
    found = _ask(uri, "experiments/get-by-name?" + urllib.parse.urlencode({"experiment_name": experiment}))
    if found.status == 404 and found.json()["error_code"] == "RESOURCE_DOES_NOT_EXIST":
        return None
    return str(found.json()["experiment"]["experiment_id"])


def _has_interface(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _ask(uri: str, what: str, payload: Mapping[str, Any] | None = None) -> http_client.HttpResponse:
    """Raises OSError where no answer comes."""
    return http_client.request(
        f"{shown(uri)}/api/2.0/mlflow/{what}",
        method="GET" if payload is None else "POST",
        payload=payload,
        timeout_seconds=ANSWER_SECONDS,
    )


def shown(uri: str) -> str:
    """The tracker's address without what it says of a user."""
    parts = urllib.parse.urlsplit(uri)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
