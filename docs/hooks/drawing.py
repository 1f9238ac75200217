"""Drawings that a page has as Mermaid flowcharts, as SVG: mermaid.js would be loaded from another host.

Layers by the longest way from above, as Sugiyama et al. (1981) draw a graph: an arrow over several layers passes
through a place in each, and places stand where their neighbours' are, on average.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise

FLOWCHART = re.compile(r"^```mermaid\nflowchart TD\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ARROW = re.compile(r"^(\w+) --> (\w+)$")
LETTER, PADDING, HEIGHT = 8.0, 20.0, 30.0  # px: a letter's width, around a name, of a box
GAP, BETWEEN, BEND = 18.0, 52.0, 10.0  # px: between boxes, between layers, of an arrow that passes a layer
SWEEPS = 12
Place = tuple[str, ...]  # (name,) of a box; (from, to, layer) where an arrow passes
Edge = tuple[Place, Place]


def with_drawings(markdown: str) -> str:
    """The page with an SVG in place of each flowchart. Raises ValueError for a line that is no name and no arrow."""
    return FLOWCHART.sub(lambda found: drawn(*_read(found[1].splitlines())), markdown)


def _read(lines: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    names: list[str] = []
    arrows: list[tuple[str, str]] = []
    for line in map(str.strip, lines):
        if found := ARROW.match(line):
            arrows.append((found[1], found[2]))
        elif re.fullmatch(r"\w+", line):
            names.append(line)
        else:
            raise ValueError(f"a drawing has names and arrows alone, not {line!r}")
    return names, arrows


def layers_of(names: Sequence[str], arrows: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Layer of each name, 0 at the top: below everything that points at it. Raises ValueError for a circle."""
    layer = dict.fromkeys(names, 0)
    for _ in range(len(names) + 1):
        too_high = [(a, b) for a, b in arrows if layer[b] <= layer[a]]
        if not too_high:
            return layer
        for a, b in too_high:
            layer[b] = max(layer[b], layer[a] + 1)
    raise ValueError("the arrows form a circle")


def drawn(names: Sequence[str], arrows: Sequence[tuple[str, str]]) -> str:
    """The SVG of a flowchart, in one line, in the colours of the page."""
    both = {(a, b) for a, b in arrows if (b, a) in arrows and names.index(a) < names.index(b)}
    arrows = [(a, b) for a, b in arrows if (b, a) not in both]
    layer = layers_of(names, arrows)
    rows: list[list[Place]] = [[] for _ in range(1 + max(layer.values(), default=0))]
    for name in names:
        rows[layer[name]].append((name,))
    edges: list[Edge] = []
    for a, b in arrows:
        passed: list[Place] = [(a, b, str(at)) for at in range(layer[a] + 1, layer[b])]
        for at, place in enumerate(passed, layer[a] + 1):
            rows[at].append(place)
        edges += pairwise([(a,), *passed, (b,)])
    _order(rows, edges)
    return _svg(rows, edges, both)


def _order(rows: list[list[Place]], edges: Sequence[Edge]) -> None:
    """Sort each row by where its neighbours stand, from above and from below in turn."""
    above: dict[Place, list[Place]] = {}
    below: dict[Place, list[Place]] = {}
    for a, b in edges:
        below.setdefault(a, []).append(b)
        above.setdefault(b, []).append(a)
    for sweep in range(SWEEPS):
        near, order = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        for fixed, row in pairwise(order):
            _sort(row, fixed, near)


def _sort(row: list[Place], fixed: Sequence[Place], near: Mapping[Place, Sequence[Place]]) -> None:
    at = {place: (number + 0.5) / len(fixed) for number, place in enumerate(fixed)}
    now = {place: (number + 0.5) / len(row) for number, place in enumerate(row)}
    means = {p: [at[q] for q in near.get(p, ())] or [now[p]] for p in row}
    row.sort(key=lambda place: sum(means[place]) / len(means[place]))


def _width(place: Place) -> float:
    return BEND if len(place) > 1 else LETTER * len(place[0]) + PADDING


def _svg(rows: Sequence[Sequence[Place]], edges: Sequence[Edge], both: Collection[tuple[str, str]]) -> str:
    total = max(sum(map(_width, row)) + GAP * (len(row) + 1) for row in rows)
    middle: dict[Place, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        gap = (total - sum(map(_width, row))) / (len(row) + 1)
        x = gap
        for place in row:
            middle[place] = (x + _width(place) / 2, GAP + HEIGHT / 2 + number * (HEIGHT + BETWEEN))
            x += _width(place) + gap
    height = 2 * GAP + len(rows) * HEIGHT + (len(rows) - 1) * BETWEEN
    parts = [_line(middle, a, b, _way(a, b) in both and len(a) == 1) for a, b in edges]
    parts += [_box(place[0], *middle[place]) for row in rows for place in row if len(place) == 1]
    head = (
        f'<svg role="img" viewBox="0 0 {total:.0f} {height:.0f}" style="max-width:{total:.0f}px" '
        'font-family="inherit" font-size="14" fill="none" stroke="currentColor">'
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto-start-reverse">'
        '<path d="M0 0L8 4L0 8z" fill="currentColor" stroke="none"/></marker>'
    )
    return f"<p>{head}{''.join(parts)}</svg></p>"


def _way(a: Place, b: Place) -> tuple[str, str]:
    """Which arrow a line from one place to the next is of."""
    return (a[0], b[0]) if len(a) == len(b) == 1 else (a[0], a[1]) if len(a) > 1 else (b[0], b[1])


def _line(middle: Mapping[Place, tuple[float, float]], a: Place, b: Place, two_way: bool) -> str:
    """A curve from one place down to the next; a head where an arrow ends, and where one of two ways begins."""
    (x1, y1), (x2, y2) = middle[a], middle[b]
    y1 += HEIGHT / 2 * (len(a) == 1)
    y2 -= HEIGHT / 2 * (len(b) == 1)
    half = (y1 + y2) / 2
    head = ' marker-end="url(#head)"' if len(b) == 1 else ""
    head += ' marker-start="url(#head)"' if two_way else ""
    curve = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {half:.0f} {x2:.0f} {half:.0f} {x2:.0f} {y2:.0f}"
    return f'<path opacity="0.5" d="{curve}"{head}/>'


def _box(name: str, x: float, y: float) -> str:
    width = _width((name,))
    return (
        f'<rect x="{x - width / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{width:.0f}" height="{HEIGHT:.0f}" rx="4"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" fill="currentColor" stroke="none">'
        f"{escape(name)}</text>"
    )
