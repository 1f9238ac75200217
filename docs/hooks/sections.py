"""The sections that a user writes, read from their pydantic classes: every key with type, default, bounds, unit and
meaning.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from escala.schema.base import LARGEST_OF, StoredPath
from escala.schema.kinds import Kinds, KindSection

REQUIRED = "required"
WORDS = {
    int: "integer",
    float: "number",
    bool: "`true` or `false`",
    str: "text",
    SecretStr: "text",
    Path: "path",
    Any: "anything",
    type(None): "null",
}
UNITS = {
    "flops_per_second": "FLOP/s",
    "bytes_per_second": "bytes/s",
    "parameters_per_second": "parameters/s",
    "usd_per_device_hour": "USD per device hour",
    "gco2e_per_kwh": "g CO2e/kWh",
    "joules_per_flop": "J/FLOP",
    "joules_per_byte": "J/byte",
    "nats_per_token": "nats per token",
    "characters": "characters",
    "sequences": "sequences",
    "iterations": "iterations",
    "episodes": "episodes",
    "parameters": "parameters",
    "seconds": "s",
    "tokens": "tokens",
    "steps": "steps",
    "flops": "FLOP",
    "watts": "W",
    "bytes": "bytes",
    "nats": "nats",
}
"""By how a key's name ends; names carry units."""


@dataclass(frozen=True)
class Key:
    """One key of a section, as Markdown. `meaning` is empty where nobody has written it down."""

    name: str
    type: str
    default: str
    bounds: str
    unit: str
    meaning: str


def keys(section: type[BaseModel]) -> list[Key]:
    """The keys of a section, in their order."""
    return [_key(name, field) for name, field in section.model_fields.items()]


def _key(name: str, field: FieldInfo) -> Key:
    kind = type_of(field.annotation, field.metadata)
    bounds = [*_bounds(field.annotation, field.metadata)]
    numeric = any(word in kind for word in ("integer", "number", "(#sourced)"))
    if numeric and name in LARGEST_OF and not any(text.startswith("<") for text in bounds):
        bounds.append(f"<= {_short(LARGEST_OF[name])}")
    unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), "") if numeric else ""
    return Key(name, kind, _default(field), ", ".join(bounds), unit, _meaning(name, field))


def _meaning(name: str, field: FieldInfo) -> str:
    if field.description:
        return field.description
    if name == "kind":
        return "which kind the section is of"
    nested = sections_in(field.annotation, field.metadata)
    return first_sentence(nested[0]) if len(nested) == 1 else ""


def first_sentence(section: type[Any]) -> str:
    """Of a class's docstring, as one line."""
    text = " ".join((section.__doc__ or "").split())
    return text.partition(". ")[0].rstrip(".")


def sections_in(annotation: Any, metadata: Any = ()) -> list[type[BaseModel]]:
    """The section classes that a key's value may hold; of a registry of kinds, each kind."""
    registry = next((each for each in metadata if isinstance(each, Kinds)), None)
    if registry is not None:
        return list(registry.values())
    if get_origin(annotation) is Annotated:
        inner, *rest = get_args(annotation)
        return sections_in(inner, rest)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Literal:
        return []
    return [each for part in get_args(annotation) for each in sections_in(part)]


def type_of(annotation: Any, metadata: Any = ()) -> str:
    """A key's type in words; a section is a link to its own table."""
    if get_origin(annotation) is Annotated:
        inner, *rest = get_args(annotation)
        return type_of(inner, rest)
    if any(isinstance(each, Kinds) for each in metadata):
        return " or ".join(map(link, sections_in(annotation, metadata)))
    if any(each in get_args(StoredPath)[1:] for each in metadata):
        return " or ".join(
            "null" if part is type(None) else "path" for part in get_args(annotation) or (str,)
        )
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_of, inside))
    if origin is Literal:
        return ", ".join(f"`{_plain(option)}`" for option in inside)
    if origin is list:
        return f"list of {type_of(inside[0])}"
    if origin is dict:
        return f"map of {type_of(inside[0])} to {type_of(inside[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return link(annotation)
    return WORDS[annotation]


def link(section: type[BaseModel]) -> str:
    """To the section's own table."""
    return f"[{kind_of(section) or 'section'}](#{anchor(section)})"


def kind_of(section: type[BaseModel]) -> str:
    """What `kind` says in a section of this class; "" where it has none."""
    field = section.model_fields.get("kind")
    options = get_args(field.annotation) if field else ()
    return options[0] if len(options) == 1 else ""


def anchor(section: type[BaseModel]) -> str:
    """Of the section's table."""
    return section.__name__.lower()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    if field.default_factory not in (None, list, dict):
        return "computed"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, KindSection):
        return f"`{value.kind}`"
    if isinstance(value, BaseModel):
        return "its own defaults"
    if isinstance(value, list):
        value = [{"kind": kind_of(type(each))} if isinstance(each, BaseModel) else each for each in value]
    return f"`{_plain(value)}`" if value != "" else "empty"


def _plain(value: Any) -> str:
    """A value as YAML takes it."""
    if isinstance(value, Path):
        return str(value)
    return " ".join(value.split()) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(number: float) -> str:
    """1000 as 1000, 1e8 as 1e8."""
    return re.sub(r"e\+?(-?)0?", r"e\1", f"{number:g}")


def _bounds(annotation: Any, metadata: Any) -> Iterator[str]:
    for each in metadata:
        if isinstance(each, FieldInfo):
            yield from _bounds(None, each.metadata)
        for name, text in (("gt", "> {}"), ("ge", ">= {}"), ("lt", "< {}"), ("le", "<= {}")):
            if getattr(each, name, None) is not None:
                yield text.format(_short(getattr(each, name)))
        for name, text in (("min_length", "at least {} long"), ("max_length", "at most {} long")):
            if getattr(each, name, None) is not None:
                yield text.format(getattr(each, name))
        if getattr(each, "pattern", None) is not None:
            yield f"matches `{each.pattern}`"
    if get_origin(annotation) is Annotated:
        inner, *rest = get_args(annotation)
        yield from _bounds(inner, rest)
    elif get_origin(annotation) is not Literal and not sections_in(annotation):
        for part in get_args(annotation):
            yield from _bounds(part, ())
