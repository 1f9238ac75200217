"""A tracker that only appends to files: what a workload writes to, so that a tracker that is away stops
nothing.

Each writer (the driver, rank 0's process) has a file of its own, `events-HOST-PID-N.jsonl`, one event a line;
so a line that a killed writer left unfinished is the last of its file. On a full disk events wait in memory, within
bounds, and a line that was cut off is continued where it ended. `delivery.py` carries them to MLflow. No mlflow here.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from escala.contract import lines
from escala.contract.files import insist, no_room
from escala.tracking.base import Dataset, Lifecycle, Metric
from escala.tracking.events import event_line, parse_event

log = logging.getLogger("escala.delivery")
DROPPED_TAG = "escala.metrics_dropped"
LIMIT_BYTES = 64 * 2**20
WAITING_METRICS_BYTES, WAITING_BYTES = 8 * 2**20, 64 * 2**20  # held in memory while the disk is full
SAY_SECONDS = 1.0  # between two updates of the tag that counts what was dropped


class SpoolTracker:
    """See Tracker. Every call is one write to the file when it returns: a killed process loses nothing that
    it said. Only while the disk is full events are held in memory, and written by a later call or by `drain`.

    Args:
        directory: the spool; made at the first event.
        limit_bytes: of metrics by this writer. Beyond it metrics are dropped, counted, and the count is said
        in the tag `escala.metrics_dropped`; the other events are few and always kept.
        holds: False: a full disk is an OSError instead, and the caller tries again.
    """

    def __init__(self, directory: str | Path, limit_bytes: int = LIMIT_BYTES, holds: bool = True) -> None:
        self._directory, self._limit, self._holds = Path(directory), limit_bytes, holds
        self._descriptor: int | None = None
        self._metric_bytes = self._dropped = self._said = 0
        self._said_at = 0.0
        self._waiting: deque[bytes] = deque()  # the first one may be written in part
        self._waiting_bytes = 0

    def start(
        self,
        key: str,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        time_ms: int | None = None,
    ) -> str:
        """See Tracker. The id is the key; the tracker's own is in the file `run_id`, once the run exists."""
        given = {"experiment": experiment, "name": name, "tags": dict(tags), "params": dict(params)}
        self._append({"event": "start", "key": key, "time_ms": _now(time_ms), **given})
        return key

    def metrics(self, run_id: str, metrics: Iterable[Metric]) -> None:
        """See Tracker."""
        points = [[m.key, float(m.value), m.step, m.time_ms] for m in metrics]
        if not points:
            return
        line = event_line({"event": "metrics", "points": points})
        if self._metric_bytes + len(line) > self._limit or self._waiting_bytes > WAITING_METRICS_BYTES:
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
        self._append({"event": "dataset", **asdict(dataset)})

    def text(self, run_id: str, path: str, content: str) -> None:
        """See Tracker."""
        line = event_line({"event": "text", "path": path, "content": content})
        if self._waiting_bytes + len(line) > WAITING_BYTES:
            print(f"escala: no room on the disk: {path} is not kept", file=sys.stderr, flush=True)
            return
        self._write(line)

    def finish(self, run_id: str, status: str, time_ms: int | None = None) -> None:
        """See Tracker."""
        if self._dropped > self._said:
            self._say_dropped()
        self._append({"event": "finish", "status": status, "time_ms": _now(time_ms)})

    def drain(self) -> None:
        """See Tracker."""
        insist(self._flush, f"what the run's spool {self._directory} still has to take")

    def lifecycle(self, run_id: str) -> Lifecycle:
        """See Tracker."""
        return "active"

    def _say_dropped(self) -> None:
        self._said, self._said_at = self._dropped, time.monotonic()
        self._append({"event": "tags", "tags": {DROPPED_TAG: str(self._dropped)}})

    def _append(self, event: dict[str, Any]) -> None:
        self._write(event_line(event))

    def _write(self, line: bytes) -> None:
        full = bool(self._waiting)
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        try:
            self._flush()
        except OSError as error:
            if not self._holds or not no_room(error):
                raise
            if not full:
                why = f"no room for the run's spool {self._directory} ({error.strerror})"
                print(f"escala: {why}; what it would take waits in memory", file=sys.stderr, flush=True)

    def _flush(self) -> None:
        """Write all that waits. Raises OSError; what is left is written by the next call, from where it ended."""
        if self._waiting and self._descriptor is None:
            self._descriptor = self._open()
        while self._waiting:
            line = self._waiting[0]
            written = os.write(self._descriptor or 0, line)
            self._waiting_bytes -= written
            if written == len(line):
                self._waiting.popleft()
            else:
                self._waiting[0] = line[written:]

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


def close_spool(
    directory: str | Path,
    status: str,
    start: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Finish the run of a writer that was killed before it could. No effect where it did, or where nothing was
    written. Raises OSError, on a full disk for one: then it is to be tried again.

    Args:
        status: FINISHED, FAILED or KILLED (MLflow's words).
        start: the arguments of `SpoolTracker.start`, for a spool whose first event is lost.
        tags: what the run is given then.
    """
    kinds = {event["event"] for event in read_events(Path(directory))}
    tracker = SpoolTracker(directory, holds=False)
    if "start" not in kinds:
        if not kinds or start is None:
            return
        tracker.start(**start)
    if "finish" not in kinds:
        if tags:
            tracker.tags("", tags)
        tracker.finish("", status)


def read_events(directory: Path) -> Iterable[dict[str, Any]]:
    """All whole events of a spool, file by file; lines that are none are left out."""
    for path in sorted(directory.glob("events-*.jsonl")):
        for line, _ in lines.whole(path):
            try:
                yield parse_event(line)
            except ValueError:
                continue  # delivery says so, once


def _now(time_ms: int | None) -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000 if time_ms is None else time_ms
