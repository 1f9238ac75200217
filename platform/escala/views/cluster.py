"""The cluster's processes, and the checkpoints that a home can spare."""

from __future__ import annotations

from escala.views.base import View


class ProcessView(View):
    """One process of the cluster. `state`: running, dead, suspended, absent, external, unknown."""

    name: str
    state: str
    pid: int | None
    address: str
    log: str | None


class ClusterView(View):
    """All processes of the cluster. `notes`: what keeps jobs from moving on, and what to do."""

    processes: tuple[ProcessView, ...]
    notes: tuple[str, ...]
    runs_page: str | None  # in MLflow, once there are runs
    running: bool  # nothing is missing


class CheckpointView(View):
    """A checkpoint's directory and its size."""

    path: str
    size_bytes: int


class GarbageView(View):
    """Checkpoints that the retention rule gives up; and why others cannot be used, which nobody but you deletes."""

    checkpoints: tuple[CheckpointView, ...]
    damaged: tuple[str, ...]
    deleted: bool  # the checkpoints are gone
