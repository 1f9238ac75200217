"""A tracker that only appends to files: what a workload writes to, so that a tracker that is away stops
nothing.

Each writer (the driver, rank 0's process) has a file of its own, `events-HOST-PID-N.jsonl`, one event a line;
so a line that a killed writer left unfinished is the last of its file. `delivery.py` carries them to MLflow.
No mlflow here.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from escala.tracking.tracker import Dataset, Metric

DROPPED_TAG = "escala.metrics_dropped"
LIMIT_BYTES = 64 * 2**20
SAY_SECONDS = 1.0  # between two updates of the tag that counts what was dropped


class SpoolTracker:
    """See Tracker. Every call is one write to the file when it returns: a killed process loses nothing that
    it said.

    Args:
        directory: the spool; made at the first event.
        limit_bytes: of metrics by this writer. Beyond it metrics are dropped, counted, and the count is said
        in the tag `escala.metrics_dropped`; the other events are few and always kept.
    """

    def __init__(self, directory: str | Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._directory, self._limit = Path(directory), limit_bytes
        self._descriptor: int | None = None
        self._metric_bytes = self._dropped = self._said = 0
        self._said_at = 0.0

    def start(
        self, key: str, experiment: str, name: str, tags: Mapping[str, str], params: Mapping[str, str]
    ) -> str:
        """See Tracker. The id is the key; the tracker's own is in the file `run_id`, once the run exists."""
        given = {"experiment": experiment, "name": name, "tags": dict(tags), "params": dict(params)}
        self._append({"event": "start", "key": key, "time_ms": time.time_ns() // 1_000_000, **given})
        return key

    def metrics(self, run_id: str, metrics: Iterable[Metric]) -> None:
        """See Tracker."""
        points = [[m.key, float(m.value), m.step, m.time_ms] for m in metrics]
        if not points:
            return
        line = _line({"event": "metrics", "points": points})
        if self._metric_bytes + len(line) > self._limit:
            self._dropped += len(points)
            if time.monotonic() - self._said_at > SAY_SECONDS:
                self._say_dropped()
            return
        self._metric_bytes += len(line)
        self._write(line)

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """See Tracker."""
        self._append({"event": "tags", "tags": dict(tags)})

    def dataset(self, run_id: str, dataset: Dataset) -> None:
        """See Tracker."""
        self._append({"event": "dataset", "dataset": asdict(dataset)})

    def text(self, run_id: str, path: str, content: str) -> None:
        """See Tracker."""
        self._append({"event": "text", "path": path, "content": content})

    def finish(self, run_id: str, status: str) -> None:
        """See Tracker."""
        if self._dropped > self._said:
            self._say_dropped()
        self._append({"event": "finish", "status": status, "time_ms": time.time_ns() // 1_000_000})

    def _say_dropped(self) -> None:
        self._append({"event": "tags", "tags": {DROPPED_TAG: str(self._dropped)}})
        self._said, self._said_at = self._dropped, time.monotonic()

    def _append(self, event: dict[str, Any]) -> None:
        self._write(_line(event))

    def _write(self, line: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = self._open()
        left = memoryview(line)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def _open(self) -> int:
        self._directory.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            path = self._directory / f"events-{socket.gethostname()}-{os.getpid()}-{number}.jsonl"
            try:
                return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
            except FileExistsError:  # a second tracker of this process, or an earlier process of this pid
                number += 1

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a SpoolTracker belongs to its process; open another one on the same directory")


def _line(event: dict[str, Any]) -> bytes:
    # NaN and infinities as Python writes them; `delivery` reads them back with the same library.
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def close_spool(directory: str | Path, status: str) -> None:
    """Finish the run of a writer that was killed before it could. No effect where it did, or where no run was
    started.

    status: FINISHED, FAILED or KILLED (MLflow's words).
    """
    events = {e["event"] for e in read_events(Path(directory))}
    if "start" in events and "finish" not in events:
        SpoolTracker(directory).finish("", status)


def read_events(directory: Path) -> Iterable[dict[str, Any]]:
    """All whole events of a spool, file by file."""
    for path in sorted(directory.glob("events-*.jsonl")):
        with path.open("rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))
