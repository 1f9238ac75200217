"""Whether plain data, from a file or a database that anybody may have written, fit a dataclass.

Standard library only; quick enough for every row of a long list.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
INT64 = range(-(2**63), 2**63)  # what a database and a tracker can hold


def parse(content: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError for all that is none, too deep a one included."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error


def build(kind: type[T], data: object) -> T:
    """The dataclass `kind` from a JSON object; keys that it has not, of a newer version, are left out.

    Raises ValueError that names the field that is missing or has a wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"it is not an object but a {type(data).__name__}")
    known = {name: data[name] for name in _checks(kind) if name in data}
    if problem := misfit(kind, known):
        raise ValueError(problem)
    return kind(**known)


def misfit(kind: type[Any], data: Mapping[str, object]) -> str:
    """Why `data` are not the fields of the dataclass `kind`; empty where they are."""
    for name, (required, quick, check, shown) in _checks(kind).items():
        if name not in data:
            if required:
                return f"{name} is missing"
        elif type(data[name]) not in quick and not check(data[name]):
            return f"{name} is {data[name]!r:.80}, and not {shown}"
    return ""


Check = Callable[[object], bool]


_known: dict[type[Any], dict[str, tuple[bool, frozenset[type], Check, str]]] = {}


def _checks(kind: type[Any]) -> dict[str, tuple[bool, frozenset[type], Check, str]]:
    """By field: whether it must be there, types of which every value fits, the whole check, its name."""
    if kind not in _known:
        _known[kind] = _make_checks(kind)
    return _known[kind]


def _make_checks(kind: type[Any]) -> dict[str, tuple[bool, frozenset[type], Check, str]]:
    hints, found = get_type_hints(kind), {}
    for field in fields(kind):
        hint = hints[field.name]
        required = field.default is MISSING and field.default_factory is MISSING
        shown = str(getattr(hint, "__name__", hint) if get_origin(hint) is None else hint)
        found[field.name] = (required, frozenset(_quick(hint)), _check(hint), shown.replace("typing.", ""))
    return found


def _is_float(value: object) -> bool:
    """A whole number too, where it is not beyond all floats."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() <= 1023
    return isinstance(value, float)


def _quick(hint: Any) -> set[type]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return set().union(*(_quick(each) for each in arguments))
    if hint in (str, bool, float, type(None), bytes):
        return {hint}
    if origin is dict and arguments == (str, Any):  # JSON has no other keys
        return {dict}
    return set()


def _check(hint: Any) -> Check:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: True
    if hint is float:
        return _is_float
    if hint is int:
        return lambda value: isinstance(value, int) and not isinstance(value, bool) and value in INT64
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in arguments
    if origin in (Union, types.UnionType):
        checks = [_check(each) for each in arguments]
        return lambda value: any(check(value) for check in checks)
    if origin is dict:
        key, item = map(_check, arguments)
        return lambda value: isinstance(value, dict) and all(key(k) and item(v) for k, v in value.items())
    if origin in (list, Sequence):
        each = _check(arguments[0])
        return lambda value: isinstance(value, list) and all(map(each, value))
    return lambda value: isinstance(value, hint)
