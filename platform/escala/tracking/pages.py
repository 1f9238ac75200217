"""Addresses of MLflow's pages (3.17), for people. No mlflow here: its import takes seconds.

An experiment's own address opens on traces, of which training has none; so the table of its runs is linked, in the view
for training (`workflowType`). Addresses hold no password.
"""

from __future__ import annotations

import urllib.parse

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
    if not uri.startswith(("http://", "https://")):
        return None
    query = urllib.parse.urlencode({"experiment_name": experiment})
    address = f"{shown(uri)}/api/2.0/mlflow/experiments/get-by-name?{query}"
    try:
        found = http_client.request(address, timeout_seconds=ANSWER_SECONDS)
        return runs_page(uri, str(found.json()["experiment"]["experiment_id"]))
    except (OSError, ValueError, KeyError, TypeError):  # a link less
        return None


def shown(uri: str) -> str:
    """The tracker's address without what it says of a user."""
    parts = urllib.parse.urlsplit(uri)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
