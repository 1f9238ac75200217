"""A notebook as a page: its cells, and the outputs that are stored in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any


def notebook_page(path: Path) -> str:
    """Its Markdown, and a link to the notebook itself. Raises ValueError for an output that no page shows."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [part for cell in cells for part in _cell(cell)]
    parts.append(f'The notebook itself: <a href="../{path.name}" download>{path.name}</a>.')
    return "\n\n".join(parts) + "\n"


def _cell(cell: Mapping[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        yield _output(output)


def _output(output: Mapping[str, Any]) -> str:
    if output["output_type"] == "stream":
        return _text(output["text"])
    data = output.get("data", {})
    if "image/png" in data:
        image, words = "".join(data["image/png"]).strip(), escape("".join(data["text/plain"]))
        return f'<img alt="{words}" src="data:image/png;base64,{image}">'
    if "text/plain" in data:
        return _text(data["text/plain"])
    raise ValueError(f"an output of type {output['output_type']} has neither text nor image")


def _text(lines: str | list[str]) -> str:
    return "```text\n" + "".join(lines).rstrip("\n") + "\n```"
