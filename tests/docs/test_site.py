"""The site: built without a warning, loading nothing from another host, its search complete; and what its hook does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs.hooks.drawing import layers_of, with_drawings
from docs.hooks.notebook import notebook_page
from docs.hooks.offline import loaded_from_elsewhere

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    directory = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return directory


def test_every_page_is_built_and_can_be_searched(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = {entry["location"].partition("#")[0] for entry in index}
    sources = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    sources += [notebook.relative_to(ROOT / "docs") for notebook in (ROOT / "docs").rglob("*.ipynb")]
    wanted = {page.with_suffix("").as_posix().removesuffix("index").rstrip("/") for page in sources}
    wanted |= {f"reference/{name}" for name in ("cli", "specs", "settings", "python", "views", "errors")}
    assert {location.rstrip("/") for location in found} == wanted | {"figures", "changelog", "contributing"}
    assert all((site / location / "index.html").is_file() for location in found)
    text = " ".join(entry["text"] for entry in index)
    assert all(
        word in text for word in ("--idempotency-key", "zero_stage", "ESCALA_HOME", "LawError", "plan_law")
    )
    assert not list(site.rglob("*.py"))


def test_a_page_that_loads_from_another_host_is_found(site: Path, tmp_path: Path) -> None:
    assert loaded_from_elsewhere(site) == []
    (tmp_path / "a.html").write_text(
        '<link rel="canonical" href="https://here.example/"><a href="https://example.org">a</a>'
        '<script src="//cdn.example/x.js"></script><link rel="stylesheet" href="https://fonts.example/css">'
        '<img src="https://example.org/a.png"><p style="background: url(https://example.org/b.png)">'
        '<script>import x from "https://cdn.example/y.mjs"</script><style>@import "https://example.org/z.css"</style>'
    )
    (tmp_path / "b.css").write_text(
        "a { background: url('http://example.org/c.png') } b { background: url(d.png) }"
    )
    assert [found.rpartition("/")[2] for found in loaded_from_elsewhere(tmp_path)] == [
        "x.js",
        "css",
        "a.png",
        "b.png",
        "y.mjs",
        "z.css",
        "c.png",
    ]


def test_a_flowchart_becomes_a_drawing() -> None:
    chart = "Before.\n\n```mermaid\nflowchart TD\n  a\n  b\n  c\n  a --> b\n  b --> c\n  a --> c\n  c --> b\n```\n"
    drawn = with_drawings(chart)
    assert drawn.startswith("Before.\n\n<p><svg ")
    assert drawn.count("<rect ") == 3
    assert drawn.count("marker-start") == 1  # b and c import each other
    assert "mermaid" not in drawn
    assert layers_of(["a", "b", "c"], [("a", "b"), ("b", "c"), ("a", "c")]) == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("lines", ["a\n  b\n  c\n  a --> b\n  b --> c\n  c --> a\n", "a -.-> b\n"])
def test_a_drawing_that_cannot_be_drawn_is_refused(lines: str) -> None:
    with pytest.raises(ValueError, match=r"circle|names and arrows"):
        with_drawings(f"```mermaid\nflowchart TD\n  {lines}```\n")


def test_a_notebook_is_a_page_with_its_outputs(tmp_path: Path) -> None:
    path = tmp_path / "some.ipynb"
    image = {"output_type": "display_data", "data": {"image/png": "aGk=\n", "text/plain": ["<Figure>"]}}
    said = {"output_type": "stream", "name": "stdout", "text": ["1\n", "2\n"]}
    cells = [
        {"cell_type": "markdown", "source": ["# Some\n", "text"]},
        {"cell_type": "code", "source": ["print(1)\n", "print(2)"], "outputs": [said, image]},
    ]
    path.write_text(json.dumps({"cells": cells}))
    page = notebook_page(path)
    assert page.startswith("# Some\ntext\n\n```python\nprint(1)\nprint(2)\n```\n\n```text\n1\n2\n```\n\n")
    assert '<img alt="&lt;Figure&gt;" src="data:image/png;base64,aGk=">' in page
    cells[1]["outputs"] = [{"output_type": "error", "ename": "ValueError"}]
    path.write_text(json.dumps({"cells": cells}))
    with pytest.raises(ValueError, match="error"):
        notebook_page(path)
