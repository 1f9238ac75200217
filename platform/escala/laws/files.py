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
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala.contract.errors import LawError, NotFoundError
from escala.laws import cells, scales
from escala.laws.exports import Export, flattened, recognised, trainer_state
from escala.laws.forms import known_inputs

if TYPE_CHECKING:
    import pandas as pd

LOSS = "loss_nats"
ATTENTION = "attention"  # the column of its kind, as `ModelConfig.attention_words` has it
NAMES = ("run_id", "tokenizer_fingerprint", "evaluation_fingerprint", ATTENTION)
RUN_LABELS = ("job_id", "name", "seed")
REFUSAL = "escala_refusal"  # the column in which a table says why a row is no point; empty: it is one
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
BINARY = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip or a spreadsheet", b"PAR1": "Parquet", b"BZh": "bzip2"}
TRAINER_STATE = "trainer_state.json of Hugging Face"
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


def read_points_file(
    file: str | Path,
    rename: Mapping[str, str],
    names: Collection[str] = (),
    constants: Mapping[str, float] | None = None,
) -> PointsFile:
    """The table in `file`, its columns renamed.

    Args:
        rename: {column of the file: column of a law's points}.
        names: further columns (of the file, or renamed) that hold names and not numbers, e.g. the one of --group.
        constants: {column of a law's points: its value in every row}, for what the file does not say.

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
    export = recognised(raw.names, raw.columns, rename)
    if export is not None:
        raw, rename = _of_export(raw, export, path), {**export.mapping, **rename}
    raw = _with_constants(raw, constants or {}, rename, path)
    renamed = _renamed(raw.names, rename)
    labels = [export.run_column] if export is not None and export.run_column else []
    points, written = _frame(raw, renamed, path, {*NAMES, *names, *labels, REFUSAL})
    source = f"{path.name} sha256={hashlib.sha256(data).hexdigest()[:16]}"
    understood = {
        "file": path.name,
        "encoding": encoding,
        **raw.understood,
        "columns": list(raw.names),
        "mapping": dict(rename),
        "constants": dict(constants or {}),
        "written": written,
        "rows": len(points),
        "row_numbers": f"{raw.unit}s of the file, counted from 1",
    }
    return PointsFile(points, source, understood)


def with_constants(given: str | Path) -> tuple[Path, dict[str, float]]:
    """(file, {column: value}) of FILE::COLUMN=NUMBER,... Raises LawError for what is no number."""
    text = str(given)
    file, mark, stated = text.rpartition("::")
    if not mark or Path(text).exists():
        return Path(text), {}
    found = dict[str, float]()
    for each in stated.split(","):
        name, _, value = (part.strip() for part in each.partition("="))
        number = cells.to_float(value) if value else None
        if not name or number is None or name in found:
            raise LawError(
                f"'{each}' in '{text}' is not COLUMN=NUMBER.", f"For example {file}::n_active=1.2e8"
            )
        found[name] = number
    return Path(file), found


def together(files: Sequence[PointsFile]) -> PointsFile:
    """Several tables as one; a row is then called FILE:ROW. One table stays as it is."""
    import pandas as pd

    if len(files) == 1:
        return files[0]
    frames = []
    for number, each in enumerate(files, 1):
        name = each.understood["file"]
        same = sum(name == other.understood["file"] for other in files) > 1
        index = [f"{name}{f' ({number})' if same else ''}:{row}" for row in each.points.index]
        frames.append(each.points.set_axis(pd.Index(index, name="row")))
    mapping = {old: new for each in files for old, new in each.understood["mapping"].items()}
    understood = {
        "file": ", ".join(each.understood["file"] for each in files),
        "mapping": mapping,
        "checkpoints_of_runs": all(each.understood.get("checkpoints_of_runs") for each in files),
        "runs_of_escala": all(each.understood.get("runs_of_escala") for each in files),
        "files": [each.understood for each in files],
        "rows": sum(each.understood["rows"] for each in files),
    }
    return PointsFile(pd.concat(frames), "; ".join(each.source for each in files), understood)


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
    kind, records = _foreign(text, records, path)
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
    understood = {"format": kind, "separator": None, "checkpoints_of_runs": kind == TRAINER_STATE}
    return _Raw(names, columns, list(range(1, len(rows) + 1)), "record", understood)


def _foreign(text: str, records: Any, path: Path) -> tuple[str, Any]:
    """(format, records): those of a trainer_state.json of Hugging Face or of MLflow's runs; others as they are."""
    first = dict(records) if isinstance(records, _Pairs) else {}
    if "log_history" in first:
        rows = trainer_state(json.loads(text), str(path))
        return TRAINER_STATE, [_Pairs([*row.items(), ("run_id", str(path))]) for row in rows]
    listed = records if isinstance(records, list) and not isinstance(records, _Pairs) else []
    if not listed or not all(
        isinstance(each, _Pairs) and {"info", "data"} <= set(dict(each)) for each in listed
    ):
        return "json", records
    runs = [flattened(each) for each in json.loads(text)]
    keys = dict.fromkeys(key for run in runs for key in run)
    return "runs of MLflow", [_Pairs([(key, run.get(key)) for key in keys]) for run in runs]


def _of_export(raw: _Raw, export: Export, path: Path) -> _Raw:
    """The table of another tool: rows of runs that did not finish are refused, and it is said what was understood."""
    if all(export.reasons):
        raise LawError(f"{path}: no run finished ({export.reasons[0]}).", "Export the finished runs.")
    understood = {**raw.understood, "format": export.kind, "assumed": export.assumed}
    return replace(
        raw,
        names=[*raw.names, REFUSAL],
        columns=[*raw.columns, list(export.reasons)],
        understood=understood,
    )


def _with_constants(raw: _Raw, constants: Mapping[str, float], rename: Mapping[str, str], path: Path) -> _Raw:
    """The table with a column for each constant. Raises LawError for an unknown column, or one that it has."""
    for name in constants:
        if name not in quantities():
            raise LawError(
                f"A law's points have no column '{name}'.", _nearest(name, quantities(), "they are")
            )
        if name in raw.names or name in rename.values():
            raise LawError(f"{path} has the column {name} already.", f"Leave out ::{name}=...")
    columns = [[value] * len(raw.rows) for value in constants.values()]
    return replace(raw, names=[*raw.names, *constants], columns=[*raw.columns, *columns])


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


def _frame(
    raw: _Raw, renamed: Sequence[str], path: Path, names: Collection[str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """The table, and of each column that is not in plain numbers how it was read."""
    import pandas as pd

    written = dict[str, str]()

    found: dict[str, pd.Series] = {}
    index, numbers = pd.Index(raw.rows, name=raw.unit), quantities()
    for old, new, column in zip(raw.names, renamed, raw.columns, strict=True):

        def where(i: int, old: str = old) -> str:
            return f"{path}, {raw.unit} {raw.rows[i]}, column {old}"

        nested = next((i for i, cell in enumerate(column) if isinstance(cell, list | dict)), None)
        if nested is not None:
            raise LawError(f"{where(nested)}: a nested value.", "A table has one value a cell: leave it out.")
        if new in numbers:
            values, said = _numbers(old, new, column, where)
            if said:
                written[new] = said
        else:
            values = cells.texts(column) if new in names or old in names else cells.plain(column)
        is_float = all(isinstance(value, float) for value in values)
        found[new] = pd.Series(values, index=index, dtype="float64" if is_float else None)
    _one_decimal_mark(raw, renamed, written, path)
    frame = pd.DataFrame(found, index=index)
    if not raw.comments:
        return frame, written
    stated = frame[REFUSAL] if REFUSAL in frame else pd.Series(None, index=index, dtype=object)
    marked = frame.index.isin(raw.comments)
    return frame.assign(**{REFUSAL: stated.astype(object).mask(marked, COMMENT)}), written


def _numbers(old: str, new: str, column: Sequence[Any], where: cells.Where) -> tuple[list[Any], str]:
    """(a column's numbers, how they were written where not plainly: its style, and its header's unit)."""
    style, factor = cells.style(column), scales.factor_of(old, new)
    if style == cells.SUFFIXES and (factor is not None or new == LOSS):
        style = None  # twice a unit, or a unit of a loss: an error that names the cell
    values = cells.quantities(column, where) if style is None else [cells.in_style(c, style) for c in column]
    if factor is None:
        return values, style or ""
    scaled = [value * factor if isinstance(value, int | float) else value for value in values]
    for i, value in enumerate(scaled):
        large = isinstance(value, float) and new not in ("compute_flops", "energy_joules")
        if large and scales.LARGEST_COUNT <= value < math.inf:
            raise LawError(
                f"{where(i)}: {column[i]!r} times {factor:g}, as the header says, is {value:.3g}.",
                "If the cells are plain counts, take the unit out of the header.",
            )
    return scaled, ", ".join(text for text in (style, f"times {factor:g}, the unit in {old!r}") if text)


def _one_decimal_mark(raw: _Raw, renamed: Sequence[str], written: Mapping[str, str], path: Path) -> None:
    """Raise LawError where one column has decimal commas and another points that may separate its thousands."""
    if not any("decimal commas" in said for said in written.values()):
        return
    for old, new, column in zip(raw.names, renamed, raw.columns, strict=True):
        if new not in quantities() or "decimal commas" in written.get(new, ""):
            continue
        for number, cell in zip(raw.rows, column, strict=True):
            if isinstance(cell, str) and "." in cell:
                raise LawError(
                    f"{path}, {raw.unit} {number}, column {old}: {cell!r} has a point in a file with decimal commas.",
                    "Write every number with the same decimal mark.",
                )
