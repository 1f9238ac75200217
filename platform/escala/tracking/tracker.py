"""`open_tracker`: the tracker at an address.

Two kinds: MLflow itself (`http:`, `sqlite:`, `postgresql:`), and a spool (`spool:DIRECTORY`), a bounded local
queue that a workload appends to without importing mlflow and that the reconcile loop delivers, now or when the
server is back (`spool.py`).
"""

from __future__ import annotations

from escala.tracking.base import Dataset, Lifecycle, Metric, Tracker
from escala.tracking.mlflow_tracker import MlflowTracker
from escala.tracking.spool import SpoolTracker

__all__ = ["Dataset", "Lifecycle", "Metric", "Tracker", "open_tracker"]


def open_tracker(uri: str) -> Tracker:
    """The tracker at `uri`. Raises SpecError for an unknown kind; mlflow is imported only where it is used."""
    if uri.startswith("spool:"):
        return SpoolTracker(uri.removeprefix("spool:"))
    return MlflowTracker(uri)
