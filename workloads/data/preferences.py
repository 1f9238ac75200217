"""Preferences in JSON lines, the format of the common sets: `prompt`, `chosen`, `rejected`, and perhaps a `margin`.

Training on them: Bradley-Terry (docs/theory C.7) and DPO (C.9). A held-out part, where no file of its own is given, is
split off by `dialogues.split`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from escala.contract.errors import DataError
from workloads.data.dialogues import Prompt, prompt_of, read_lines, text_of, write_lines


@dataclass(frozen=True)
class Preference:
    """Somebody preferred one answer to another one."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0  # of the rewards, in nats, >= 0 (Touvron et al. 2023, eq. 2)


def read_preferences(path: Path) -> Iterator[Preference]:
    """The preferences of a JSONL file, in its order.

    Raises DataError, with file and line, where a line is none, and where there is none.
    """
    for where, record in read_lines(path):
        chosen, rejected = text_of(where, record, "chosen"), text_of(where, record, "rejected")
        if chosen == rejected:
            raise DataError(f"{where}: chosen and rejected are the same text.", "Remove the line.")
        yield Preference(prompt_of(where, record), chosen, rejected, _margin(where, record))


def _margin(where: str, record: dict[str, Any]) -> float:
    margin = record.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise DataError(f"{where}: the margin {margin!r} is no number >= 0.", "Correct it, or leave it out.")
    return float(margin)


def write_preferences(path: Path, preferences: Iterable[Preference], **columns: Iterable[Any]) -> int:
    """Write a JSONL file; `columns` are further keys, a value for each line. Returns how many lines.

    Raises ValueError where a column is shorter or longer.
    """
    rows = zip(preferences, *columns.values(), strict=True)
    return write_lines(path, (_record(one, dict(zip(columns, values, strict=True))) for one, *values in rows))


def _record(preference: Preference, columns: dict[str, Any]) -> dict[str, Any]:
    margin = {"margin": preference.margin} if preference.margin else {}
    return {
        "prompt": preference.prompt,
        "chosen": preference.chosen,
        "rejected": preference.rejected,
        **margin,
        **columns,
    }
