"""Sends events to a run, and leaves out what the tracker refuses for what it says: it would do so each time,
and hold up all that comes after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from escala.tracking.base import Dataset, Metric, Tracker

BATCH = 1000  # metrics a call: MLflow's limit
HOPELESS = 3  # refused points of one name, after which the others of a batch are not tried
_DATASET = [field.name for field in fields(Dataset)]
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE")


def refused(error: BaseException) -> bool:
    """Whether the tracker answered that it will not do this, now or later."""
    return getattr(error, "error_code", "") in _REFUSALS


def is_away(error: BaseException | None) -> bool:
    """Whether the tracker did not answer at all: no connection, or none in time."""
    import requests

    away = (ConnectionError, TimeoutError, requests.ConnectionError, requests.Timeout)
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, away):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


class Sender:
    """Sends to the run `run_id`, which must be there.

    Args:
        tell: (what is left out, a detail) -> said once.
    """

    def __init__(self, tracker: Tracker, tell: Callable[[str, object], None], run_id: str = "") -> None:
        self._tracker, self._tell, self._run_id = tracker, tell, run_id

    def start(self, event: dict[str, Any]) -> str:
        """Open the run of a `start` event; without its parameters and tags where the tracker refuses those."""
        names, began = (event["key"], event["experiment"], event["name"]), event.get("time_ms")
        try:
            return self._tracker.start(*names, event["tags"], event["params"], began)
        except Exception as error:
            if not refused(error):
                raise
            self._tell(
                "the run's parameters or tags are refused; it starts with the tags that are taken", error
            )
        self._run_id = self._tracker.start(*names, {}, {}, began)
        self._tags(event["tags"])
        return self._run_id

    def send(self, events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Send them in order, all metrics last, together. Returns the last `finish` among them."""
        points: list[Metric] = []
        closing = None
        for event in events:
            if event["event"] == "metrics":
                points += [Metric(*point) for point in event["points"]]
            elif event["event"] == "tags":
                self._tags(event["tags"])
            elif event["event"] == "text":
                path, content = event["path"], event["content"]
                self._take(f"the text {path:.80}", partial(self._tracker.text, self._run_id, path, content))
            elif event["event"] == "dataset":
                dataset = Dataset(**{name: event[name] for name in _DATASET})
                self._take(
                    f"the data set {dataset.name:.80}", partial(self._tracker.dataset, self._run_id, dataset)
                )
            elif event["event"] == "finish":
                closing = event
        for first in range(0, len(points), BATCH):
            self._metrics(points[first : first + BATCH])
        return closing

    def _take(self, what: str, send: Callable[[], None]) -> bool:
        """Send; False where it is refused for what it says. Any other error passes."""
        try:
            send()
        except Exception as error:
            if not refused(error) or self._tracker.lifecycle(self._run_id) != "active":
                raise
            self._tell(f"{what} is refused by the tracker and left out", error)
            return False
        return True

    def _tags(self, tags: dict[str, str]) -> None:
        try:
            self._tracker.tags(self._run_id, tags)
        except Exception as error:
            if not refused(error):
                raise
            for key, value in tags.items():
                self._take(f"the tag {key:.80}", partial(self._tracker.tags, self._run_id, {key: value}))

    def _metrics(self, batch: Sequence[Metric]) -> None:
        """Send a batch; of a refused one, all but the points for which it is."""
        bad: Counter[str] = Counter()
        waiting = [batch]
        while waiting:
            points = [m for m in waiting.pop() if bad[m.key] < HOPELESS]
            if not points:
                continue
            try:
                self._tracker.metrics(self._run_id, points)
            except Exception as error:
                if not refused(error) or self._tracker.lifecycle(self._run_id) != "active":
                    raise
                if len(points) == 1:
                    bad[points[0].key] += 1
                    self._tell(f"a point of the metric {points[0].key:.80} is refused and left out", error)
                else:
                    points = sorted(points, key=lambda m: m.key)
                    waiting += [points[len(points) // 2 :], points[: len(points) // 2]]
