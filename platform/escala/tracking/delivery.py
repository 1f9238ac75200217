"""Carries spools to the tracker, now or when it is back. Killed at any line and repeated, it doubles nothing.

Why: `start` finds the run that the same key opened before; MLflow keeps one of two equal (key, step, time,
value) points; tags, texts and `finish` overwrite. So events may be sent twice, and the offsets are written
after the tracker has taken them. Events of all writers of a spool go to one run; `finish` goes last, when
every file is read to its end.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from escala.records import write_json
from escala.tracking.tracker import Dataset, Metric, Tracker, open_tracker

log = logging.getLogger("escala.delivery")
BATCH = 1000  # metrics a call: MLflow's limit
READ_BYTES = 2**20  # at a time, of one file; a longer line is read whole
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0


@dataclass
class _State:
    """DIRECTORY/delivered.json: how far each file has been taken, and what is held back."""

    offsets: dict[str, int] = field(default_factory=dict)
    run_id: str | None = None
    finish: str | None = None  # the status to close the run with, when all else is there
    finished: bool = False


class Delivery:
    """Delivers spools to one tracker.

    Args:
        target: the tracker's address, or a function that opens it; called when first needed.
        clock: monotonic seconds.
    """

    def __init__(
        self, target: str | Callable[[], Tracker], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._open: Callable[[], Tracker] = (
            (lambda: open_tracker(target)) if isinstance(target, str) else target
        )
        self._clock = clock
        self._tracker: Tracker | None = None
        self._wait = FIRST_WAIT_SECONDS
        self._not_before = 0.0
        self._said = ""

    def deliver(self, directory: str | Path, tags: Mapping[str, str] | None = None) -> bool:
        """Deliver what the spool holds and the tracker has not; its run starts with `tags` added. True
        when all is there and the run is closed,
        and for a spool that nothing was written to. Never raises for a tracker that is away: False, said once
        in the log, and not tried again before a wait that doubles up to half a minute.
        """
        spool = Path(directory)
        if not any(spool.glob("events-*.jsonl")):
            return True
        state = _read_state(spool)
        if state.finished and not _unread(spool, state):
            return True
        if self._clock() < self._not_before:
            return False
        try:
            self._tracker = self._tracker or self._open()
            done = self._catch_up(self._tracker, spool, state, tags or {})
        except Exception as error:  # noqa: BLE001 - whatever the client raises, a delivery is tried again
            self._away(error)
            return False
        self._wait, self._not_before, self._said = FIRST_WAIT_SECONDS, 0.0, ""
        return done

    def _away(self, error: Exception) -> None:
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        if type(error).__name__ != self._said:
            log.warning("the tracker does not take runs now; they stay in their spools: %s", what)
        self._said = type(error).__name__
        self._not_before = self._clock() + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT_SECONDS)

    def _catch_up(self, tracker: Tracker, spool: Path, state: _State, tags: Mapping[str, str]) -> bool:
        if state.run_id is None:
            start = _find_start(spool)
            if start is None:  # metrics before the run: the starting writer's file is not here yet
                return False
            given = (start["key"], start["experiment"], start["name"], {**start["tags"], **tags})
            state.run_id = tracker.start(*given, start["params"])
            (spool / ".run_id").write_text(state.run_id)
            os.replace(spool / ".run_id", spool / "run_id")
            write_json(spool / "delivered.json", state)
        for path in sorted(spool.glob("events-*.jsonl")):
            for events, offset in _chunks(path, state.offsets.get(path.name, 0)):
                _send(tracker, state, events)
                state.offsets[path.name] = offset
                write_json(spool / "delivered.json", state)
        if state.finish is None:
            return False
        tracker.finish(state.run_id, state.finish)
        state.finished = True
        write_json(spool / "delivered.json", state)
        return not _unread(spool, state)


def _send(tracker: Tracker, state: _State, events: list[dict[str, Any]]) -> None:
    """Send `events` in order, neighbouring metrics together."""
    run_id = str(state.run_id)
    points: list[Metric] = []
    for event in events:
        if event["event"] == "metrics":
            points += [Metric(*point) for point in event["points"]]
        elif event["event"] == "tags":
            _take(event, partial(tracker.tags, run_id, event["tags"]))
        elif event["event"] == "dataset":
            _take(event, partial(tracker.dataset, run_id, Dataset(**event["dataset"])))
        elif event["event"] == "text":
            _take(event, partial(tracker.text, run_id, event["path"], event["content"]))
        elif event["event"] == "finish":
            state.finish, state.finished = event["status"], False
    for first in range(0, len(points), BATCH):
        batch = points[first : first + BATCH]
        shown = {"event": "metrics", "keys": sorted({m.key for m in batch})}
        _take(shown, partial(tracker.metrics, run_id, batch))


def _take(event: dict[str, Any], send: Callable[[], None]) -> None:
    """Send an event. One that the tracker refuses for what it says (a bad name) would be refused for ever: it
    is left out, and the log says so. Any other error passes.
    """
    try:
        send()
    except Exception as error:
        if getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":
            raise
        log.error("the tracker refuses %.200s: %s", event, error)


def _parse(line: bytes, path: Path) -> list[dict[str, Any]]:
    """The event of a line; none of one that a full disk cut short and the next one continued."""
    try:
        return [json.loads(line)]
    except ValueError:
        log.error("a line of %s is not an event, and left out: %.100r", path, line)
        return []


def _chunks(path: Path, offset: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """(events, offset after them) of the whole lines of `path` from `offset` on, about READ_BYTES each."""
    with path.open("rb") as file:
        file.seek(offset)
        while lines := file.readlines(READ_BYTES):
            whole = [line for line in lines if line.endswith(b"\n")]  # the last may still be being written
            if not whole:
                return
            offset += sum(map(len, whole))
            yield [event for line in whole for event in _parse(line, path)], offset
            if len(whole) < len(lines):
                return


def _find_start(spool: Path) -> dict[str, Any] | None:
    """The event that opens the run: always its writer's first."""
    for path in sorted(spool.glob("events-*.jsonl")):
        with path.open("rb") as file:
            line = file.readline()
        if line.endswith(b"\n"):
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "start":
                return event
    return None


def _unread(spool: Path, state: _State) -> bool:
    """Whether a file has whole lines that were not taken."""
    for path in spool.glob("events-*.jsonl"):
        offset = state.offsets.get(path.name, 0)
        if path.stat().st_size > offset and any(True for _ in _chunks(path, offset)):
            return True
    return False


def _read_state(spool: Path) -> _State:
    try:
        return _State(**json.loads((spool / "delivered.json").read_text()))
    except FileNotFoundError:
        return _State()
