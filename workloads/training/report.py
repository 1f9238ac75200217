"""What rank 0 tells the world while it trains: progress.json, metrics for the tracker, and facts for the
driver.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from escala.contract.files import insist, no_room
from escala.contract.records import AttemptFiles, AttemptSpec, Progress, write_json
from escala.tracking.tracker import Metric, open_tracker

PROGRESS_SECONDS = 0.5
FLUSH_SECONDS = 2.0
TABLES = "mlflow.loggedArtifacts"  # the tag that lists a run's tables


class Reporter:
    """One per run, on rank 0 (the others get none). `close` delivers what is buffered."""

    def __init__(self, spec: AttemptSpec, run_id: str) -> None:
        self._files = AttemptFiles(spec.directory)
        self._tracker = open_tracker(spec.tracking_uri)
        self._run_id, self._prefix = run_id, spec.metric_prefix
        self._buffer: list[Metric] = []
        self._flushed = self._progressed = 0.0
        self._facts: dict[str, Any] = {}
        self._tables: list[str] = []
        self._last: Progress | None = None
        self._full = self._unwritten = False  # the disk, when last written to; facts that it has not

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        """Buffer metrics of one step; those that are None are unknown and not recorded."""
        now = time.time_ns() // 1_000_000
        self._buffer += [
            Metric(self._prefix + key, float(v), step, now) for key, v in values.items() if v is not None
        ]
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._tracker.tags(self._run_id, {key: value})

    def flush(self) -> None:
        """Hand the buffered metrics to the tracker."""
        if self._buffer:
            self._tracker.metrics(self._run_id, self._buffer)
            self._buffer = []
        self._flushed = time.monotonic()

    def text(self, path: str, content: str) -> None:
        """Store an artifact of the run."""
        self._tracker.text(self._run_id, path, content)

    def table(self, path: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Store an artifact that MLflow's page of the run shows as a table (`MlflowClient.log_table`'s format)."""
        self.text(path, json.dumps({"columns": columns, "data": rows}, ensure_ascii=False))
        self._tables = list(dict.fromkeys([*self._tables, path]))
        listed = [{"path": each, "type": "table"} for each in self._tables]
        self._tracker.tags(self._run_id, {TABLES: json.dumps(listed)})

    def progress(self, progress: Progress, force: bool = False) -> None:
        """Write progress.json, at most twice a second unless `force`. A full disk keeps the last one."""
        if force or time.monotonic() - self._progressed > PROGRESS_SECONDS:
            self._progressed = time.monotonic()
            self._last = progress
            self._write(self._files.progress, progress)

    def facts(self, **values: Any) -> None:
        """Add to facts.json; on a full disk, once there is room."""
        self._facts |= values
        self._unwritten = not self._write(self._files.facts, self._facts)

    def close(self) -> None:
        """Deliver what is buffered; waits for room on a full disk."""
        self.flush()
        self._tracker.drain()
        if self._unwritten:
            insist(lambda: write_json(self._files.facts, self._facts), "the facts of the run")
        if self._last is not None and self._full:
            insist(lambda: write_json(self._files.progress, self._last), "the progress of the run")

    def _write(self, path: Path, value: Any) -> bool:
        """Write, if there is room; says so where there is none any more. Whether it did."""
        try:
            write_json(path, value)
        except OSError as error:
            if not no_room(error):
                raise
            if not self._full:
                print(f"escala: no room on the disk for {path.name}: training goes on without", flush=True)
            self._full = True
            return False
        self._full = False
        return True
