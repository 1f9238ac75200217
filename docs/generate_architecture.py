"""Writes docs/architecture.md from the imports: packages, what each is for, and the arrows between them.

`make architecture` writes it; with `--check` (in `make lint`) a file that no longer fits the imports is an error.
"""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path

import grimp

TARGET = Path(__file__).with_name("architecture.md")
ROOTS = {
    "escala": "the control plane: who asked, what happened, what we learned (no torch)",
    "workloads": "the data plane: what runs on the cluster, with tensors",
    "tune_spaces": "science: which values to try",
}
HEAD = """# Architecture

Written by `make architecture` from the imports; `make lint` fails when it is out of date. The arrows that are allowed
are import-linter's contracts in `pyproject.toml`. An arrow reads "imports"; lazy imports and those for types count.
"""
PURE = "In the drawings an arrow that others imply is left out; the tables have all of them."


def main() -> int:
    """Write or check the page. Returns the exit code."""
    text = page()
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") == text:
            return 0
        print(
            f"{TARGET} does not fit the imports\n  hint: run `make architecture` and commit it",
            file=sys.stderr,
        )
        return 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


def page() -> str:
    """The page's Markdown."""
    full = grimp.build_graph(*ROOTS)
    rooms = rooms_of(full)
    arrows = arrows_between(full, rooms)
    between = {(a.split(".")[0], b.split(".")[0]) for a, b in arrows if a.split(".")[0] != b.split(".")[0]}
    parts = [HEAD, "## Packages", drawing(sorted(ROOTS), between), table(list(ROOTS.items()), between), PURE]
    for root in ROOTS:
        own = [room for room in rooms if room.split(".")[0] == root]
        if len(own) == 1:
            continue
        inside = {(a, b) for a, b in arrows if a in own and b in own}
        reaching = {(a, b) for a, b in arrows if a in own}
        order = sorted(own, key=lambda room: (-depth(room, inside), room))
        described = [(room, purpose(room)) for room in order]
        parts += [f"## Inside {root}", drawing(order, reduced(inside)), table(described, reaching)]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def rooms_of(graph: grimp.ImportGraph) -> list[str]:
    """The packages and modules one level below the roots; a root without any stands for itself."""
    found = [child for root in ROOTS for child in graph.find_children(root)]
    return sorted(found)


def arrows_between(graph: grimp.ImportGraph, rooms: list[str]) -> set[tuple[str, str]]:
    """(importer, imported) of every pair of rooms."""
    return {
        (room, other)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if (room := room_of(module)) != (other := room_of(imported)) and room in rooms and other in rooms
    }


def room_of(module: str) -> str:
    """The room that a module is in."""
    return ".".join(module.split(".")[:2])


def depth(room: str, arrows: set[tuple[str, str]]) -> int:
    """Length of the longest way down from a room. Raises ValueError where rooms import in a circle."""
    return _depth(room, arrows, ())


def _depth(room: str, arrows: set[tuple[str, str]], path: tuple[str, ...]) -> int:
    if room in path:
        raise ValueError(f"a circle of imports: {' -> '.join([*path, room])}")
    below = [_depth(b, arrows, (*path, room)) for a, b in arrows if a == room]
    return 1 + max(below, default=-1)


def reduced(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that no longer way implies (transitive reduction of a graph without circles)."""
    below: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in below:
            direct = {b for a, b in arrows if a == room}
            below[room] = direct.union(*(reach(b) for b in direct))
        return below[room]

    return {(a, b) for a, b in arrows if not any(b in reach(c) for x, c in arrows if x == a and c != b)}


def drawing(rooms: list[str], arrows: set[tuple[str, str]]) -> str:
    """A Mermaid drawing."""
    short = {room: room.split(".")[-1] for room in rooms}
    lines = [f"  {short[room]}" for room in rooms]
    lines += [f"  {short[a]} --> {short[b]}" for a, b in sorted(arrows)]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])


def table(described: list[tuple[str, str]], arrows: set[tuple[str, str]]) -> str:
    """Name, purpose, imports: a row each."""
    lines = ["| package | for | imports |", "|---|---|---|"]
    for room, text in described:
        imports = ", ".join(f"`{b}`" for a, b in sorted(arrows) if a == room)
        lines.append(f"| `{room}` | {text} | {imports} |")
    return "\n".join(lines)


def purpose(room: str) -> str:
    """The first sentence of a room's docstring."""
    spec = find_spec(room)
    if spec is None or spec.origin is None:
        raise ValueError(f"{room} has no file")
    text = " ".join(
        (ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or "").split()
    )
    return text.partition(". ")[0].rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
