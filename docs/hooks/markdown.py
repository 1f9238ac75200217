"""Markdown that a page is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without the columns in which nothing stands; "" without rows."""
    rows = list(rows)
    if not rows:
        return ""
    kept = [at for at in range(len(head)) if any(row[at] for row in rows)]
    lines = [
        [head[at] for at in kept],
        ["---"] * len(kept),
        *([_cell(row[at]) for at in kept] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(*parts: str) -> str:
    """The parts that are not empty, a paragraph each."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def prose(docstring: str | None) -> str:
    """A docstring's text up to its Args, Attributes or Raises, each paragraph in one line."""
    told: list[str] = []
    for paragraph in (docstring or "").split("\n\n"):
        if paragraph.strip().startswith(("Args:", "Attributes:", "Raises:", "Returns:")):
            break
        told.append(" ".join(paragraph.split()))
    return "\n\n".join(told).strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
