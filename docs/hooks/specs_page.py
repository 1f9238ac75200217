"""reference/specs.md: every key of what a user writes, from the schemas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pydantic import BaseModel

from docs.hooks.markdown import page, prose, table
from docs.hooks.sections import anchor, keys, kind_of, sections_in
from escala.schema.base import Strict
from escala.schema.hardware import Cluster
from escala.schema.serve import ServeConfig
from escala.schema.workloads import WORKLOADS, Workload
from escala.spec import JobOptions
from escala.sweeps.space import Space

HEAD = """# Specs

A spec is YAML. Values come from the defaults, then from files in their order, then from `--set key.of.a.section=value`;
an unknown key fails and names the nearest one. `escala submit WORKLOAD --dry-run` prints the whole of it, with what
was derived. Numbers are finite and take neither texts nor booleans; `4e5` is an integer, too. `null` (None) is nothing
given.
"""
FILES: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("Sweep spaces", Space, "For `escala sweep FILE.yaml`: what varies, and by which design."),
    (
        "Rollout service",
        ServeConfig,
        "For `escala rollouts up FILE.yaml`: the application that serves a model.",
    ),
    (
        "Clusters",
        Cluster,
        "For `--cluster FILE.yaml` and `ESCALA_CLUSTER`: devices and prices, each with its source. "
        "`device` may also be a name in a `devices.yaml` beside the file.",
    ),
)


@dataclass
class Book:
    """The sections met so far, and the keys at which each stands."""

    places: dict[type[BaseModel], list[str]] = field(default_factory=dict)

    def add(self, section: type[BaseModel], at: str) -> None:
        """A section and all in it. `at`: its dotted key; [] for an item of a list or a map."""
        known = self.places.setdefault(section, [])
        if at in known:
            return
        known.append(at)
        for name, key in section.model_fields.items():
            many = "[]" if str(key.annotation).startswith(("list", "dict")) else ""
            for inner in sections_in(key.annotation, key.metadata):
                self.add(inner, f"{at}.{name}{many}".lstrip("."))


def specs_page() -> str:
    """The page."""
    shown: set[type[BaseModel]] = set()
    return page(
        HEAD,
        "## Workloads",
        *(part for workload, config in written() for part in _workload(workload, config)),
        "## `job` { #joboptions }",
        "In any spec; options of the command line go first.",
        prose(JobOptions.__doc__),
        _table(JobOptions),
        "## Sections of workloads",
        *_sections([config for _, config in written()], shown),
        *(part for title, root, told in FILES for part in _file(title, root, told, shown)),
    )


def written() -> list[tuple[Workload, type[Strict]]]:
    """The workloads whose configuration a user writes, and its class."""
    return [(each, each.config) for each in WORKLOADS.values() if each.config is not None]


def roots() -> list[type[BaseModel]]:
    """The classes that whole files, and `job`, are checked by."""
    return [*(config for _, config in written()), JobOptions, *(root for _, root, _ in FILES)]


def _workload(workload: Workload, config: type[Strict]) -> Iterator[str]:
    yield f"### `{workload.name}` {{ #{workload.name} }}"
    yield f"{workload.summary[0].upper()}{workload.summary[1:]}. Started by `{workload.started_by}`."
    yield prose(config.__doc__)
    yield _table(config)


def _file(title: str, root: type[BaseModel], told: str, shown: set[type[BaseModel]]) -> Iterator[str]:
    yield f"## {title} {{ #{anchor(root)} }}"
    yield told
    yield prose(root.__doc__)
    yield _table(root)
    yield from _sections([root], shown)


def _sections(roots: Iterable[type[BaseModel]], shown: set[type[BaseModel]]) -> Iterator[str]:
    """Every section inside of `roots` that was not shown before."""
    book = Book()
    for root in roots:
        book.add(root, "")
    for section, places in book.places.items():
        if places != [""] and section not in shown:
            shown.add(section)
            yield from _section(section, places)


def _section(section: type[BaseModel], places: list[str]) -> Iterator[str]:
    kind = kind_of(section)
    yield f"### `{places[0]}`" + (f", kind `{kind}`" if kind else "") + f" {{ #{anchor(section)} }}"
    yield "Also at " + ", ".join(f"`{place}`" for place in places[1:]) + "." if places[1:] else ""
    yield prose(section.__doc__)
    yield _table(section)


def _table(section: type[BaseModel]) -> str:
    rows = ((f"`{k.name}`", k.type, k.default, k.bounds, k.unit, k.meaning) for k in keys(section))
    return table(("key", "type", "default", "bounds", "unit", "meaning"), rows)
