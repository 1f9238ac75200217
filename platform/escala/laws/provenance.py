"""Where a law came from: by whom, when, from which runs, code and data, as nested JSON with a format's number.

Format 2 keeps what all of a law's runs have in common in `configuration` as a run has it: nested, numbers as numbers.
Format 1 (escala 0.1) had no number and kept dotted keys with texts; it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from escala.contract.errors import LawError, SpecError

FORMAT = 2


def in_common(configurations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What has one value in all of `configurations`, nested as they are; a section with nothing in common is absent."""
    first, *others = configurations or [{}]
    found = dict[str, Any]()
    for key, value in first.items():
        values = [other.get(key) for other in others]
        if isinstance(value, Mapping):
            if all(isinstance(each, Mapping) for each in values):
                shared = in_common([value, *(each for each in values if isinstance(each, Mapping))])
                found |= {key: shared} if shared else {}
        elif all(key in other and each == value for other, each in zip(others, values, strict=True)):
            found[key] = value
    return found


def upgraded(plain: dict[str, Any]) -> dict[str, Any]:
    """A provenance of any format that is known, as format 2. Raises LawError for one of a later escala."""
    number = plain.get("format", 1)
    if number == FORMAT:
        return plain
    if number != 1:
        raise LawError(
            f"This law's provenance has format {number}; this escala reads formats 1 and {FORMAT}.",
            "Use the escala that fitted it.",
        )
    flat = plain.get("configuration")
    return {**plain, "format": FORMAT, "configuration": None if flat is None else _nested(flat)}


def _nested(flat: Mapping[str, str]) -> dict[str, Any]:
    """Format 1's dotted keys and texts as a configuration."""
    found: dict[str, Any] = {}
    for key, text in flat.items():
        *sections, last = key.split(".")
        node = found
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = _value(text, key)
    return found


def _value(text: str, key: str) -> Any:
    from escala import documents  # a reader of YAML, for laws of 0.1 alone: a query need not wait for it

    if text in ("", "None"):
        return None if text else ""
    try:
        return documents.parse_value(text, key)
    except SpecError:  # a text that only looks like a number or a list
        return text
