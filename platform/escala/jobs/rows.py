"""Rows of the job database as records, one at a time: a damaged one is left out with a reason, told once.

SQLite takes any value into any column, and anybody may write into the file: what comes out is checked here.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import RowMapping

from escala.contract import fields
from escala.contract.errors import StateError
from escala.jobs.records import Attempt, HistoryEvent, Job
from escala.jobs.tables import JOB_ID

log = logging.getLogger("escala.store")
T = TypeVar("T", Job, Attempt, HistoryEvent)
COUNTS = {"attempts", "revision", "retries", "retries_used"}
TIMES = {"submitted_at", "changed_at", "claimed_at", "running_at", "stopping_at", "ended_at", "at"}
MOST_SECONDS = 1e12  # since 1970: some 30,000 years
OPTIONAL = ("progress", "record")  # of an attempt: without them it is as before its first report


@dataclass(frozen=True)
class NotJson:
    """The content of a JSON column that is none."""

    text: str


def load_json(content: str | bytes) -> Any:
    """The value of a JSON column; NotJson where it is none, since an exception would end the whole query."""
    try:
        return fields.parse(content)
    except (ValueError, TypeError):
        return NotJson(str(content)[:80])


def dump_json(value: Any) -> str:
    """A value for a JSON column. NaN and infinities, which JSON has not and PostgreSQL refuses, become null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class RowReader:
    """Reads rows; tells of each damaged one once in its life."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def all(self, kind: type[T], rows: Iterable[RowMapping | dict[str, Any]]) -> list[T]:
        """The readable rows as records."""
        found = []
        for row in rows:
            values, problem = _checked(kind, row)
            if problem:
                self._tell(kind, row, problem)
            else:
                found.append(kind(**values))
        return found

    def one(self, kind: type[T], row: RowMapping | dict[str, Any]) -> T:
        """The row as a record. Raises StateError where it is damaged."""
        values, problem = _checked(kind, row)
        if problem:
            raise StateError(
                f"{_name(kind, row)} cannot be read from the job database: {problem}",
                "restore the database, or correct that row; the other jobs are not concerned",
            )
        return kind(**values)

    def _tell(self, kind: type[Any], row: RowMapping | dict[str, Any], problem: str) -> None:
        name = _name(kind, row)
        if (name, problem) not in self._told:
            self._told.add((name, problem))
            log.warning("%s is damaged in the job database and left out: %s", name, problem)


def _name(kind: type[Any], row: RowMapping | dict[str, Any]) -> str:
    if kind is Job:
        return f"job {row.get('id')!s:.40}"
    what = "attempt" if kind is Attempt else "event"
    return f"{what} {row.get('number')!s:.20} of job {row.get('job_id')!s:.40}"


def _checked(kind: type[Any], row: RowMapping | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(the values, why they are no record or empty)."""
    values = dict(row)
    for name in OPTIONAL if kind is Attempt else ():
        if not isinstance(values.get(name), dict | None):
            values[name] = None
    for name, value in values.items():
        if isinstance(value, NotJson):
            return values, f"its {name} is not JSON: {value.text!r}"
    if problem := fields.misfit(kind, values):
        return values, problem
    if not JOB_ID.fullmatch(values["id" if kind is Job else "job_id"]):
        return values, "its id is none"
    for name in values.keys() & COUNTS:
        if not 0 <= values[name] < 2**31:
            return values, f"its {name} is {values[name]}"
    for name in values:
        if name in TIMES and not abs(values[name] or 0.0) < MOST_SECONDS:
            return values, f"its {name} is {values[name]}"
    return values, ""
