"""How what takes long says what it does: a function that is told a line for people."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str], None]


def silent(text: str) -> None:
    """A report that nobody reads."""
