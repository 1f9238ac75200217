"""Carries spools to the tracker, now or when it is back. Killed at any line and repeated, it doubles nothing.

Why: `start` finds the run that the same key opened before; MLflow keeps one of two equal (key, step, time,
value) points; tags, texts and `finish` overwrite. So events may be sent twice, and the offsets are written
after the tracker has taken them. Events of all writers of a spool go to one run; `finish` goes last, when
every file is read to its end.

One run that the tracker does not take waits by itself; only a tracker that two runs find away is waited for by all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from escala.contract import lines
from escala.contract.files import no_room, write_whole
from escala.contract.records import read_record, write_json
from escala.tracking.events import parse_event
from escala.tracking.sending import Sender, is_away, refused
from escala.tracking.tracker import Tracker, open_tracker

log = logging.getLogger("escala.delivery")
READ_BYTES = 2**20  # at a time, of one file
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0


@dataclass
class _State:
    """DIRECTORY/delivered.json: how far each file has been taken, and what is held back."""

    offsets: dict[str, int] = field(default_factory=dict)
    run_id: str | None = None
    finish: str | None = None  # the status to close the run with, when all else is there
    finish_ms: int | None = None  # when that was said, in Unix milliseconds
    finished: bool = False
    set_aside: str | None = None  # why nothing more is sent of it


@dataclass(frozen=True)
class _Wait:
    """When to try again. `away`: the tracker did not answer, rather than refuse. `said`: the trouble, logged."""

    not_before: float = 0.0
    seconds: float = FIRST_WAIT_SECONDS
    away: bool = False
    said: str = ""

    def again(self, now: float) -> _Wait:
        return replace(
            self, not_before=now + self.seconds, seconds=min(2 * self.seconds, LONGEST_WAIT_SECONDS)
        )


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
        self._waits: dict[Path, _Wait] = {}
        self._all = _Wait()
        self._found_away: Path | None = None  # the spool that did, last
        self._told: set[tuple[Path, str]] = set()

    def deliver(self, directory: str | Path, tags: Mapping[str, str] | None = None) -> bool:
        """Deliver what the spool holds and the tracker has not; its run starts with `tags` added.

        True when all is there and the run is closed, for a spool that nothing was written to, and for one whose
        run a person has deleted. Never raises: for whatever cannot be delivered now, False, said once in the
        log, and not tried again before a wait that doubles up to half a minute.
        """
        spool = Path(directory)
        if self._clock() < max(self._all.not_before, self._waits.get(spool, _Wait()).not_before):
            return False
        try:
            done = self._deliver(spool, tags or {})
        except Exception as error:  # noqa: BLE001 - of one run; it is logged, tried again, and the others go on
            self._failed(spool, error)
            return False
        self._waits.pop(spool, None)
        return done

    def _deliver(self, spool: Path, tags: Mapping[str, str]) -> bool:
        if not any(spool.glob("events-*.jsonl")):
            return True
        state = _read_state(spool)
        if state.set_aside is not None or (state.finished and not _unread(spool, state)):
            return True
        if self._tracker is None:
            self._tracker = self._open()
        try:
            done = self._catch_up(self._tracker, spool, state, tags)
        except Exception as error:
            if not refused(error) or not self._give_up(self._tracker, spool, state):
                raise
            done = state.set_aside is not None
        self._is_back()
        return done

    def _catch_up(self, tracker: Tracker, spool: Path, state: _State, tags: Mapping[str, str]) -> bool:
        tell = _Teller(spool, self._told)
        if state.run_id is None:
            start = _find_start(spool)
            if start is None:  # metrics before the run: the starting writer's file is not here yet
                return False
            state.run_id = Sender(tracker, tell).start({**start, "tags": {**start["tags"], **tags}})
            write_whole(spool / "run_id", state.run_id)
            write_json(spool / "delivered.json", state)
        sender = Sender(tracker, tell, state.run_id)
        for path in sorted(spool.glob("events-*.jsonl")):
            for events, offset in _chunks(path, state.offsets.get(path.name, 0), tell):
                closing = sender.send(events)
                if closing is not None:
                    state.finish, state.finish_ms = closing["status"], closing.get("time_ms")
                    state.finished = False
                state.offsets[path.name] = offset
                write_json(spool / "delivered.json", state)
        if state.finish is None:
            return False
        tracker.finish(state.run_id, state.finish, state.finish_ms)
        state.finished = True
        write_json(spool / "delivered.json", state)
        return not _unread(spool, state)

    def _give_up(self, tracker: Tracker, spool: Path, state: _State) -> bool:
        """After a refusal: where the run is not there any more, note what follows. False where it is."""
        if state.run_id is None:
            return False
        found = tracker.lifecycle(state.run_id)
        if found == "deleted":
            state.set_aside = f"run {state.run_id} was deleted in the tracker"
            write_json(spool / "delivered.json", state)
            log.warning("%s; no more is sent of it, and %s is left as it is", state.set_aside, spool)
        elif found == "absent":  # the tracker's database is another one: the spool still has all
            log.warning(
                "the tracker has lost run %s; %s is delivered from its beginning", state.run_id, spool
            )
            write_json(spool / "delivered.json", _State())
        return found != "active"

    def _failed(self, spool: Path, error: Exception) -> None:
        now, said, away = self._clock(), type(error).__name__, is_away(error)
        before = self._waits.get(spool, _Wait())
        what = f"{said}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        if away and (self._found_away not in (None, spool) or self._tracker is None):
            if not self._all.said:
                log.warning("the tracker does not take runs now; they stay in their spools: %s", what)
            self._all = replace(self._all, said=said).again(now)
        elif before.said != said and no_room(error):
            log.warning("%s waits until there is room on the disk: %s", spool, what)
        elif before.said != said:
            log.warning("%s cannot be delivered now, and stays where it is; others go on: %s", spool, what)
        if away:
            self._found_away = spool
        self._waits[spool] = replace(before, away=away, said=said).again(now)

    def _is_back(self) -> None:
        """The tracker answers: where it was away, those that found it so need not wait."""
        if self._all.said:
            self._all = _Wait()
            self._waits = {spool: wait for spool, wait in self._waits.items() if not wait.away}
        self._found_away = None


class _Teller:
    """Says what is wrong with a spool, each thing once."""

    def __init__(self, spool: Path, told: set[tuple[Path, str]]) -> None:
        self._spool, self._told = spool, told

    def __call__(self, what: str, detail: object = "") -> None:
        if (self._spool, what) not in self._told:
            self._told.add((self._spool, what))
            log.error("%s: %s: %.200s (the like is not said again)", self._spool, what, detail)


def _chunks(path: Path, offset: int, tell: Callable[..., None]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """(events, offset after them) of the whole lines of `path` from `offset` on, about READ_BYTES each."""
    events: list[dict[str, Any]] = []
    if offset > path.stat().st_size:  # not this file's: all of it again, which doubles nothing
        offset = 0
    begun = after = offset
    for line, after in lines.whole(path, offset):
        try:
            events += [parse_event(line)] if line.strip() else []
        except ValueError as error:
            tell(f"a line of {path.name} is left out", f"{error}: {line[:100]!r}")
        if after - begun >= READ_BYTES:
            yield events, after
            events, begun = [], after
    if after > begun:
        yield events, after


def _find_start(spool: Path) -> dict[str, Any] | None:
    """The event that opens the run: always its writer's first whole one."""
    for path in sorted(spool.glob("events-*.jsonl")):
        for line, _ in lines.whole(path):
            try:
                event = parse_event(line)
            except ValueError:
                continue
            if event["event"] == "start":
                return event
            break
    return None


def _unread(spool: Path, state: _State) -> bool:
    """Whether a file has whole lines that were not taken."""
    for path in spool.glob("events-*.jsonl"):
        offset = state.offsets.get(path.name, 0)
        if path.stat().st_size > offset and any(True for _ in lines.whole(path, offset)):
            return True
    return False


def _read_state(spool: Path) -> _State:
    """Where it is lost or damaged, all is sent again, which doubles nothing."""
    state = read_record(_State, spool / "delivered.json") or _State()
    state.offsets = {name: max(0, offset) for name, offset in state.offsets.items()}
    return state
