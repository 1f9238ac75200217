"""The notebooks of docs: each runs from its first cell to its last, in an empty home, and prints what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs").rglob("*.ipynb"))
pytestmark = pytest.mark.slow


def printed(cell: Any) -> str:
    """What a cell writes to stdout."""
    return "".join(each["text"] for each in cell.get("outputs", []) if each.get("name") == "stdout")


def drawn(cell: Any) -> int:
    """Images that a cell shows."""
    return sum("image/png" in each.get("data", {}) for each in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESCALA_HOME", "ESCALA_TRACKING_URI", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    stored = nbformat.read(path, as_version=4)
    run = nbformat.read(path, as_version=4)
    NotebookClient(run, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, after in zip(stored.cells, run.cells, strict=True):
        assert printed(after) == printed(before), before.source
        assert drawn(after) == drawn(before), before.source
    assert any(map(drawn, stored.cells))


def test_there_is_a_notebook() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["a-law-in-python"]
