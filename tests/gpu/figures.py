"""Figures that tests measure, as rows of a table for benchmarks/README.md."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass
class Figures:
    """Of one session."""

    device: str = ""
    rows: list[tuple[str, str, str]] = field(default_factory=list)  # what, found, beside what

    def add(self, what: str, found: str, beside: str = "") -> None:
        """A row: `beside` is the bound or the prediction that it stands against."""
        self.rows.append((what, found, beside))

    def table(self) -> str:
        """Markdown."""
        versions = f"torch {torch.__version__}, Python {platform.python_version()}"
        lines = [f"{self.device}; {versions}", "", "| what | found | beside |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])

    def write(self, directory: Path) -> None:
        """gpu.md and gpu.json."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "gpu.md").write_text(self.table() + "\n", encoding="utf-8")
        (directory / "gpu.json").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
