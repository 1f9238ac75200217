"""A file of measured runs as a table: CSV with any common separator, or a JSON list of records.

The file's shape is checked, not trusted: a row of another length than the header, two columns of one name or a cell
that only looks like a number is an error with its line (counted from 1) and the fix. The index of the table is the
line of the file (of JSON: the number of the record), so that whatever is said of a row names it as an editor shows it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala.contract.errors import LawError, NotFoundError
from escala.laws import cells
from escala.laws.forms import known_inputs

if TYPE_CHECKING:
    import pandas as pd

LOSS = "loss_nats"
NAMES = ("run_id", "tokenizer_fingerprint", "evaluation_fingerprint")
RUN_LABELS = ("job_id", "name", "seed")
REFUSAL = "escala_refusal"  # the column in which a table says why a row is no point; empty: it is one
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
BINARY = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip or a spreadsheet", b"PAR1": "Parquet", b"BZh": "bzip2"}
COMMENT = "the line is a comment (it begins with #)"


def quantities() -> tuple[str, ...]:
    """The columns of a law's points that hold numbers."""
    return (LOSS, *known_inputs())


def known_columns() -> tuple[str, ...]:
    """The columns of a law's points."""
    return (*quantities(), *NAMES)


def _run_columns() -> dict[str, str]:
    """A RunRecord's field -> the column of a law's points, where they differ."""
    return {"held_out_loss_nats": LOSS} | {
        each.field: name for name, each in known_inputs().items() if each.field != name
    }


@dataclass(frozen=True)
class PointsFile:
    """A table as it was read. `source`: its name and the start of its SHA-256. `understood`: how, as plain data."""

    points: pd.DataFrame
    source: str
    understood: dict[str, Any]


@dataclass(frozen=True)
class _Raw:
    """Cells as written: a name a column, a number a row (its line, or of JSON the record's)."""

    names: list[str]
    columns: list[list[Any]]
    rows: list[int]
    unit: str  # what `rows` count: line or record
    understood: dict[str, Any]
    comments: tuple[int, ...] = ()


def read_points_file(file: str | Path, rename: Mapping[str, str], names: Collection[str] = ()) -> PointsFile:
    """The table in `file`, its columns renamed.

    Args:
        rename: {column of the file: column of a law's points}.
        names: further columns (of the file, or renamed) that hold names and not numbers, e.g. the one of --group.

    Raises NotFoundError for an absent file, LawError for one that is no table, with the line and the fix.
    """
    path = Path(file)
    if not path.is_file():
        said = f"{path} is no regular file" if path.exists() else f"there is no file {path}"
        raise NotFoundError(said, "give a CSV, or what `escala runs list --json` wrote")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LawError(f"{path} cannot be read: {error.strerror}.", "Give a readable file.") from error
    text, encoding = _decoded(data, path)
    is_json = path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{")
    raw = _json_cells(text, path) if is_json else _csv_cells(text, path)
    raw = _points_of_runs(raw)
    renamed = _renamed(raw.names, rename)
    points = _frame(raw, renamed, path, {*NAMES, *names, REFUSAL})
    source = f"{path.name} sha256={hashlib.sha256(data).hexdigest()[:16]}"
    understood = {
        "file": path.name,
        "encoding": encoding,
        **raw.understood,
        "columns": list(raw.names),
        "mapping": dict(rename),
        "rows": len(points),
        "row_numbers": f"{raw.unit}s of the file, counted from 1",
    }
    return PointsFile(points, source, understood)


def _decoded(data: bytes, path: Path) -> tuple[str, str]:
    """(text, encoding). Raises LawError for what is no text."""
    kind = next((name for magic, name in BINARY.items() if data.startswith(magic)), None)
    if kind is not None:
        raise LawError(f"{path} is {kind}, not text.", "Unpack it, or save it as CSV.")
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise LawError(f"{path}, line {line}: not {encoding} text.", "Save the file as UTF-8.") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise LawError(
            f"{path}, line {line}: a NUL character; this is binary, or UTF-16 without its mark.",
            "Save the file as UTF-8.",
        )
    if not text.strip():
        raise LawError(f"{path} is empty.", "A CSV has a header and a row for each run.")
    return text, encoding.removesuffix("-sig")


# CSV


def _csv_cells(text: str, path: Path) -> _Raw:
    separator = _separator(text, path)
    lines = _csv_lines(text, separator, path)
    number, header = next(lines)
    names = _header(header, number, path)
    rows, numbers, comments, blank, trailing = list[list[str]](), list[int](), list[int](), 0, 0
    for number, row in lines:
        if not any(row):
            blank += 1
        elif row[0].startswith("#"):
            comments.append(number)
            rows.append([""] * len(names))
            numbers.append(number)
        else:
            trailing += len(row) > len(names)
            rows.append(_fitted(row, names, number, path))
            numbers.append(number)
    if len(rows) == len(comments):
        beside = " but comments (lines that begin with #)" if comments else ""
        raise LawError(f"{path} has a header and no rows{beside}.", "Add a row for each run.")
    columns = [list(column) for column in zip(*rows, strict=True)]
    while names and not names[-1] and not any(columns[-1]):  # a separator ends every line
        names, columns = names[:-1], columns[:-1]
    names = [name or f"column {i}" for i, name in enumerate(names, 1)]
    _distinct(names, path)
    understood = {
        "format": "csv",
        "separator": SEPARATORS[separator],
        "blank_lines": blank,
        "trailing_separators": trailing,
    }
    return _Raw(names, list(columns), numbers, "line", understood, tuple(comments))


def _separator(text: str, path: Path) -> str:
    """The separator that the header has most of. Raises LawError where it has none, or two equally often."""
    header = next(line for line in text.splitlines() if line.strip() and not _is_comment(line))
    unquoted = re.sub(r'"[^"]*"', "", header)
    counts = {mark: unquoted.count(mark) for mark in SEPARATORS if mark in unquoted}
    most = [mark for mark, count in counts.items() if count == max(counts.values())]
    if len(most) == 1:
        return most[0]
    said = f"has both {' and '.join(SEPARATORS[m] for m in most)}" if most else "is one column"
    raise LawError(
        f"{path}: the header {header.strip()[:60]!r} {said}; which separator is meant is not clear.",
        f"Separate the columns by one of: {', '.join(SEPARATORS.values())}.",
    )


def _is_comment(line: str) -> bool:
    """Whether a line before the header is none: a comment, or a spreadsheet's `sep=;`."""
    return line.lstrip().startswith(("#", "sep="))


def _csv_lines(text: str, separator: str, path: Path) -> Any:
    """(line, its cells without blanks around them), from the header on."""
    reader = csv.reader(
        io.StringIO(text, newline=None), delimiter=separator, strict=True, skipinitialspace=separator != "\t"
    )
    begun, first = False, 1
    try:
        for row in reader:
            stripped = [cell.strip() for cell in row]
            if begun or (any(stripped) and not _is_comment(stripped[0])):
                begun = True
                yield first, stripped
            first = reader.line_num + 1
    except csv.Error as error:
        raise LawError(
            f"{path}, line {first}: {error}.", "Close every quote; write a quote inside a cell twice."
        ) from error


def _header(header: Sequence[str], number: int, path: Path) -> list[str]:
    given = [name for name in header if name]
    if given and all(cells.to_float(name) is not None for name in given):
        raise LawError(
            f"{path}, line {number}: numbers where the names of the columns should be.",
            "Begin with a header, e.g. params,tokens,loss (a line that begins with # is a comment).",
        )
    return [name.strip("\ufeff\u200b ") for name in header]


def _fitted(row: list[str], names: Sequence[str], number: int, path: Path) -> list[str]:
    """The row with as many cells as there are names; a separator too many at its end is no cell."""
    n = len(names)
    if len(row) == n or (len(row) > n and not any(row[n:])):
        return row[:n]
    more = len(row) > n
    raise LawError(
        f"{path}, line {number}: {len(row)} fields under {n} names ({', '.join(names)[:80]}).",
        f"Name every column, and {'quote' if more else 'write'} "
        f"{'a cell that holds the separator' if more else 'an empty cell for what is missing'}.",
    )


def _distinct(names: Sequence[str], path: Path) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            where = [str(i) for i, each in enumerate(names, 1) if each == name]
            raise LawError(
                f"{path}: {count} columns are called {name} (columns {' and '.join(where)}).",
                "Rename or remove all but one: which one is meant is not clear.",
            )


# JSON


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON as its (key, value) pairs: a dict would forget a repeated key."""


def _json_cells(text: str, path: Path) -> _Raw:
    try:
        records = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        said = str(error).splitlines()[0]
        raise LawError(f"{path} is no JSON: {said}.", "A list of records: [{...}, {...}].") from error
    if not isinstance(records, list) or isinstance(records, _Pairs) or not records:
        raise LawError(f"{path} holds no list of records.", "Write [{...}, {...}], a record for each run.")
    names = None
    for number, record in enumerate(records, 1):
        where = f"{path}, record {number}"
        if not isinstance(record, _Pairs):
            raise LawError(f"{where} is no object.", "A record is {column: value, ...}.")
        keys = [key.strip() for key, _ in record]
        repeated = next((key for key, count in Counter(keys).items() if count > 1), None)
        if repeated is not None:
            raise LawError(f"{where}: the key {repeated} is there twice.", "Leave out one of them.")
        names = names or keys
        other = sorted(set(names) ^ set(keys))
        if other:
            raise LawError(
                f"{where}: {', '.join(other)} is in some records and not in others.",
                "Give every record the same keys; null says that a value is missing.",
            )
    rows = [{key.strip(): value for key, value in record} for record in records]
    names = names or []
    columns = [[row[name] for row in rows] for name in names]
    return _Raw(
        names, columns, list(range(1, len(rows) + 1)), "record", {"format": "json", "separator": None}
    )


def _points_of_runs(raw: _Raw) -> _Raw:
    """The points of `escala runs list --json`; another table is left as it is.

    What a run measured besides its loss (seconds, memory, training loss) goes: no law is a function of it. Raises
    LawError where a run did not succeed: its loss is not that of its planned tokens.
    """
    columns = _run_columns()
    if not {"workload", "status", *columns} <= set(raw.names):
        return raw
    statuses = raw.columns[raw.names.index("status")]
    bad = [str(status) for status in statuses if status != "succeeded"]
    if bad:
        raise LawError(
            f"{len(bad)} of {len(statuses)} runs did not succeed ({', '.join(sorted(set(bad)))}).",
            "`escala runs list --status succeeded --json` leaves them out.",
        )
    kept = {
        columns.get(name, name): column
        for name, column in zip(raw.names, raw.columns, strict=True)
        if not all(cells.is_missing(cell) for cell in column)
    }
    kept = {name: kept[name] for name in (*known_columns(), *RUN_LABELS) if name in kept}
    return _Raw(
        list(kept), list(kept.values()), raw.rows, raw.unit, {**raw.understood, "runs_of_escala": True}
    )


# Both


def _renamed(names: Sequence[str], rename: Mapping[str, str]) -> list[str]:
    """The columns' names after `rename`. Raises LawError for an unknown name, and for two columns of one name."""
    targets, known = Counter(rename.values()), known_columns()
    for old, new in rename.items():
        if old not in names:
            if new in names and old in known:
                raise LawError(
                    f"The file has no column '{old}'.", f"The file's name first: --map {new}={old}"
                )
            raise LawError(f"The file has no column '{old}'.", _nearest(old, names, "it has"))
        if new not in known:
            raise LawError(f"A law's points have no column '{new}'.", _nearest(new, known, "they are"))
        if targets[new] > 1:
            both = ", ".join(each for each, target in rename.items() if target == new)
            raise LawError(f"{both} cannot all be {new}.", "Map one column to it, and leave the others.")
        if new in names and new not in rename:
            raise LawError(
                f"The file has a column '{new}' already.",
                f"Take that column out, or leave out --map {old}={new}.",
            )
    return [rename.get(name, name) for name in names]


def _nearest(name: str, names: Sequence[str], otherwise: str) -> str:
    near = get_close_matches(name, names, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"{otherwise}: {', '.join(names)}"


def _frame(raw: _Raw, renamed: Sequence[str], path: Path, names: Collection[str]) -> pd.DataFrame:
    import pandas as pd

    found: dict[str, pd.Series] = {}
    index, numbers = pd.Index(raw.rows, name=raw.unit), quantities()
    for old, new, column in zip(raw.names, renamed, raw.columns, strict=True):

        def where(i: int, old: str = old) -> str:
            return f"{path}, {raw.unit} {raw.rows[i]}, column {old}"

        nested = next((i for i, cell in enumerate(column) if isinstance(cell, list | dict)), None)
        if nested is not None:
            raise LawError(f"{where(nested)}: a nested value.", "A table has one value a cell: leave it out.")
        if new in numbers:
            values = cells.quantities(column, where)
        else:
            values = cells.texts(column) if new in names or old in names else cells.plain(column)
        is_float = all(isinstance(value, float) for value in values)
        found[new] = pd.Series(values, index=index, dtype="float64" if is_float else None)
    frame = pd.DataFrame(found, index=index)
    if not raw.comments:
        return frame
    stated = frame[REFUSAL] if REFUSAL in frame else pd.Series(None, index=index, dtype=object)
    marked = frame.index.isin(raw.comments)
    return frame.assign(**{REFUSAL: stated.astype(object).mask(marked, COMMENT)})
