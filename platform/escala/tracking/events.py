"""The events of a spool, as lines of JSON: what each kind holds, and which lines are none.

A line comes from a file that a full disk, a kill or a person may have damaged: one bad event is left out, by itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from escala.contract import fields
from escala.tracking.base import Metric

Status = Literal["FINISHED", "FAILED", "KILLED"]  # MLflow's words
_PATH = re.compile(r"(?!\.{1,2}(/|$))[^/\\\x00-\x1f%#?]+(/(?!\.{1,2}(/|$))[^/\\\x00-\x1f%#?]+)*")
_SURROGATE = re.compile(rb"\\u(0000|[dD][89a-fA-F])")  # in a line of ASCII: no tracker takes these


@dataclass(frozen=True)
class _Start:
    key: str
    experiment: str
    name: str
    tags: dict[str, str]
    params: dict[str, str]
    time_ms: int | None = None  # Unix milliseconds


@dataclass(frozen=True)
class _Metrics:
    points: list[Any]  # of [key, value, step, Unix milliseconds]


@dataclass(frozen=True)
class _Tags:
    tags: dict[str, str]


@dataclass(frozen=True)
class _Text:
    path: str
    content: str


@dataclass(frozen=True)
class _Dataset:
    name: str
    digest: str
    context: str
    source: dict[str, Any]
    profile: dict[str, Any]


@dataclass(frozen=True)
class _Finish:
    status: Status
    time_ms: int | None = None  # Unix milliseconds


_KINDS: dict[str, type[Any]] = {
    "start": _Start,
    "metrics": _Metrics,
    "tags": _Tags,
    "text": _Text,
    "dataset": _Dataset,
    "finish": _Finish,
}
_POINT = ("key", "value", "step", "time_ms")


def event_line(event: dict[str, Any]) -> bytes:
    """The line of an event. NaN and infinities as Python writes them; it reads them back."""
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def parse_event(line: bytes) -> dict[str, Any]:
    """The event of a line, which has the fields of its kind; of its points, those that are some.

    Raises ValueError that says what is wrong.
    """
    event = fields.parse(line)
    kind = event.get("event") if isinstance(event, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"it is no event that is known: {kind!r:.80}")
    if problem := fields.misfit(_KINDS[kind], event):
        raise ValueError(f"{kind}: {problem}")
    if kind == "text" and not _PATH.fullmatch(event["path"]):
        raise ValueError(f"text: {event['path']!r:.80} is no path inside a run's artifacts")
    if kind == "metrics":
        event["points"] = [point for point in event["points"] if _is_point(point)]
    return _clean(event) if _SURROGATE.search(line) else dict(event)


def _is_point(point: object) -> bool:
    if not isinstance(point, list) or len(point) != len(_POINT):
        return False
    return not fields.misfit(Metric, dict(zip(_POINT, point, strict=True)))


def _clean(value: Any) -> Any:
    """Without the characters that no UTF-8 has, and NUL, which PostgreSQL has not."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode().replace("\0", "?")
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value
