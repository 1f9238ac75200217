"""The YAML that people write (specs, spaces, clusters, Serve's files, `--set` values): one reader, strict and bounded.

YAML 1.2's core schema: booleans are true and false; numbers are decimal, 0o17, 0x1F, 1e-3, .inf; everything else that
is not quoted is text, `yes`, 1:30 and 2026-11-28 too. Underscores between digits stay allowed (2_000_000). Refused,
with the line: a key that is there twice, a leading zero, tags, several documents, and files beyond the limits below,
each of which a hostile or damaged file would otherwise turn into minutes or gigabytes.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from escala.contract.errors import NotFoundError, SpecError

MOST_BYTES = 1_000_000
MOST_VALUES = 20_000  # an alias counts as often as it is used
MOST_LEVELS = 30
MOST_DIGITS = 40  # of a number, signs and underscores included
HINT = "correct the line that is named"

_DIGITS = r"\d+(_\d+)*"
_INTEGER = re.compile(rf"[-+]?{_DIGITS}$", re.ASCII)
_BASED = re.compile(r"0(o[0-7]+|x[0-9a-fA-F]+)$")
_FLOAT = re.compile(rf"[-+]?(\.{_DIGITS}|{_DIGITS}(\.({_DIGITS})?)?)([eE][-+]?\d+)?$", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_WORDS: dict[str, bool | None] = dict.fromkeys(("", "~", "null", "Null", "NULL"), None)
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)


class Section(dict[Any, Any]):
    """A mapping that knows where each of its keys was written: key -> "FILE, line N"."""

    places: dict[Any, str]

    def __init__(
        self, items: Mapping[Any, Any] | None = None, places: Mapping[Any, str] | None = None
    ) -> None:
        super().__init__(items or {})
        self.places = dict(places or {})


def read_yaml(path: Path) -> Section:
    """The mapping in a YAML file; an empty file holds an empty one.

    Raises NotFoundError for a file that is not there; SpecError, naming the file and the line, for what is no regular
    file, cannot be read, is no YAML of this kind, or holds no mapping.
    """
    data = parse(_text(path), str(path))
    if data is None:
        return Section()
    if not isinstance(data, Section):
        raise SpecError(
            f"{path} holds a {type(data).__name__}, not a mapping",
            "write `section:` lines with keys below them",
        )
    return data


def parse(text: str, name: str) -> Any:
    """The one YAML document in `text`: None, bool, int, float, str, lists, Sections. Raises SpecError."""
    return _read(text, name)[0]


def parse_value(text: str, name: str) -> Any:
    """The value of one option, taken whole: `#` begins no comment. What begins with a bracket, a brace, a quote or
    `- ` is read as YAML, anything else is one number, word or text.

    Raises SpecError.
    """
    text = text.strip()
    if not text:
        raise SpecError(f"{name} has no value", "write null for none, and '' for an empty text")
    if not text.startswith(("[", "{", '"', "'", "- ")):
        return _scalar(text, name)
    value, end = _read(text, name)
    if text[end:].strip() or re.search(r"\s#" if text[0] == "-" else r"\s#.*\n", text):
        raise SpecError(f"{name}: more than one value, or a comment", "quote a text that holds # or quotes")
    return value


def dump(data: Mapping[str, Any]) -> str:
    """`data` as YAML that `parse` reads back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = None
    yaml.default_flow_style = False
    yaml.width = 110
    yaml.representer.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(_plain(data), stream)
    return stream.getvalue()


def place(data: Any, location: Iterable[int | str]) -> str | None:
    """Where the value at `location` (pydantic's) was written; None where it was in no file."""
    found = None
    for part in location:
        if isinstance(data, Section):
            found = data.places.get(part, found)
        inside = isinstance(data, Mapping) and part in data
        inside = inside or (isinstance(data, list) and isinstance(part, int) and part < len(data))
        data = data[part] if inside else data  # the tag of a discriminated union stands in no file
    return found


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, list | tuple) else data


def _text(path: Path) -> str:
    """Of a regular file: a pipe or a device may never end, so none is opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SpecError(f"{path} is no regular file", "give the path of a YAML file")
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}", "give the path of a YAML spec") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise SpecError(f"{path} cannot be read: {error}", "give a readable UTF-8 YAML file") from None
    if len(data) > MOST_BYTES:
        raise SpecError(f"{path} is larger than {MOST_BYTES:,} bytes", "give a spec, not data")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SpecError(f"{path}, line {line}: not UTF-8", "save the file as UTF-8") from None


def _read(text: str, name: str) -> tuple[Any, int]:
    """The document, and where in `text` it ends."""
    if len(text) > MOST_BYTES:
        raise SpecError(f"{name} is larger than {MOST_BYTES:,} bytes", "give a spec, not data")
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 2)
    try:
        reading = _Reading(iter(yaml.parse(io.StringIO(text))), name)
        return reading.document(), reading.end
    except (YAMLError, ValueError, AssertionError) as error:  # an escape beyond Unicode; %YAML 1.3
        raise _explained(error, name) from None


def _explained(error: Exception, name: str) -> SpecError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    at = f", line {mark.line + 1}" if mark is not None else ""
    return SpecError(f"{name}{at}: not YAML: {str(problem).splitlines()[0]}", HINT)


class _Reading:
    """One document, built from the parser's events, so that every limit holds before memory is taken."""

    def __init__(self, events: Iterator[Any], name: str) -> None:
        self._events, self._name = events, name
        self._anchors: dict[str, tuple[Any, int]] = {}  # -> value, how many values it is
        self._values = 0
        self.end = 0  # of what was read, in characters

    def document(self) -> Any:
        self._next()  # the stream's start
        start = self._next()
        if not isinstance(start, DocumentStartEvent):
            return None
        if start.version not in (None, (1, 2)):
            raise self._refused(
                start, "%YAML asks for another version", "YAML 1.2 is read: take the line out"
            )
        value = self._value(self._next(), 0)
        end = self.end
        self._next()  # the document's end
        after = self._next()
        if isinstance(after, DocumentStartEvent):
            raise self._refused(after, "a second document begins", "keep one document in a file")
        self.end = end
        return value

    def _next(self) -> Any:
        event = next(self._events)
        self.end = event.end_mark.index
        return event

    def _value(self, event: Any, level: int) -> Any:
        self._count(event, 1)
        if isinstance(event, AliasEvent):
            return self._alias(event)
        if getattr(event, "tag", None) is not None:
            raise self._refused(
                event, f"a tag, {event.tag}", "write the value without it; quote what is text"
            )
        if level > MOST_LEVELS:
            raise self._refused(event, f"nested more than {MOST_LEVELS} levels deep", HINT)
        before = self._values
        if isinstance(event, ScalarEvent):
            value: Any = self._text(event)
        elif isinstance(event, SequenceStartEvent):
            value = self._sequence(level)
        else:
            value = self._mapping(level)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, 1 + self._values - before
        return value

    def _alias(self, event: AliasEvent) -> Any:
        if event.anchor not in self._anchors:
            raise self._refused(
                event, f"*{event.anchor} is not defined above", f"define it with &{event.anchor}"
            )
        value, size = self._anchors[event.anchor]
        self._count(event, size)
        return deepcopy(value)  # an override of one use must not change the others

    def _sequence(self, level: int) -> list[Any]:
        values = []
        while not isinstance(event := self._next(), SequenceEndEvent):
            values.append(self._value(event, level + 1))
        return values

    def _mapping(self, level: int) -> Section:
        found, merged, lines = Section(), list[Section](), dict[str, int]()
        while not isinstance(event := self._next(), MappingEndEvent):
            key, line = self._key(event), event.start_mark.line + 1
            if str(key) in lines:
                raise SpecError(
                    f"{self._name}: the key {short(key)} is there twice, in lines {lines[str(key)]} and {line}",
                    "keep one of them",
                )
            lines[str(key)] = line
            value = self._value(self._next(), level + 1)
            if key == "<<" and not event.style:
                merged += self._merged(event, value)
                continue
            found[key] = value
            found.places[key] = f"{self._name}, line {line}"
        for section in merged:
            for key, value in section.items():
                if key not in found:
                    found[key] = value
                    found.places[key] = section.places[key]
        return found

    def _key(self, event: Any) -> str | int:
        self._count(event, 1)
        if isinstance(event, ScalarEvent) and event.tag is None and event.anchor is None:
            key = self._text(event)
            if isinstance(key, str) or type(key) is int:
                return key
        raise self._refused(event, "a key that is no text", "quote it, or write one name before the colon")

    def _merged(self, event: Any, value: Any) -> list[Section]:
        sections = value if isinstance(value, list) else [value]
        if not all(isinstance(section, Section) for section in sections):
            raise self._refused(event, "<< merges mappings, and this is none", "give an alias of a mapping")
        return sections

    def _text(self, event: ScalarEvent) -> Any:
        if any("\ud800" <= letter <= "\udfff" for letter in event.value):
            raise self._refused(event, "half a surrogate pair", "write the character itself")
        if event.style:
            return event.value
        return _scalar(event.value, f"{self._name}, line {event.start_mark.line + 1}")

    def _count(self, event: Any, values: int) -> None:
        self._values += values
        if self._values > MOST_VALUES:
            raise self._refused(
                event, f"more than {MOST_VALUES:,} values", "an alias counts as often as it is used"
            )

    def _refused(self, event: Any, what: str, hint: str) -> SpecError:
        return SpecError(f"{self._name}, line {event.start_mark.line + 1}: {what}", hint)


def _scalar(text: str, name: str) -> Any:
    """What is not quoted: a number or a word of YAML 1.2's core schema, else the text as it is."""
    if text in _WORDS:
        return _WORDS[text]
    if _NOT_FINITE.match(text):
        return float(text.replace(".", ""))
    if not (_FLOAT.match(text) or _BASED.match(text)):
        return text
    if len(text) > MOST_DIGITS:
        raise SpecError(
            f"{name}: a number of {len(text):,} characters",
            f"at most {MOST_DIGITS}; quote it if it is a text",
        )
    if _BASED.match(text):
        return int(text, 0)
    if re.match(r"[-+]?0_?[0-9]", text):
        raise SpecError(f"{name}: {text} has a leading zero", "take it out; quote it if it is a text")
    return int(text.replace("_", "")) if _INTEGER.match(text) else float(text.replace("_", ""))


def short(key: object) -> str:
    """A key as an error shows it, however long it is."""
    return str(key) if len(str(key)) <= 60 else str(key)[:59] + "…"
