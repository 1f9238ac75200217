"""Tables of points as files: each is read rightly, or refused with the line, the column and the fix."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from escala.cli.main import app
from escala.contract.errors import EscalaError, LawError
from escala.laws.files import REFUSAL, read_points_file

MAP = {"params": "n_active", "loss": "loss_nats"}
HEADER = "params,tokens,loss"


def rows(n: int = 14) -> list[list[str]]:
    rng = np.random.default_rng(5)
    compute, ratio = 10 ** rng.uniform(17, 20, n), 20 * 10 ** rng.uniform(-0.75, 0.75, n)
    size = np.sqrt(compute / 6 / ratio)
    tokens = compute / 6 / size
    loss = (1.8172 + 482.01 * size**-0.3478 + 2085.43 * tokens**-0.3658) * np.exp(
        0.003 * rng.standard_normal(n)
    )
    return [[f"{a:.0f}", f"{b:.0f}", f"{c:.4f}"] for a, b, c in zip(size, tokens, loss, strict=True)]


ROWS = rows()
BASE = "\n".join([HEADER, *(",".join(row) for row in ROWS)]) + "\n"
VALUES = [[float(cell) for cell in row] for row in ROWS]


def written(path: Path, content: str | bytes, name: str = "points.csv") -> Path:
    file = path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def grouped(cell: str) -> str:
    return f'"{int(cell):,}"'


READ: dict[str, str | bytes] = {
    "as it is": BASE,
    "semicolons": BASE.replace(",", ";"),
    "tabs": BASE.replace(",", "\t"),
    "bars": BASE.replace(",", " | "),
    "CRLF": BASE.replace("\n", "\r\n"),
    "CR": BASE.replace("\n", "\r"),
    "byte order mark": "\ufeff" + BASE,
    "UTF-16": BASE.encode("utf-16"),
    "UTF-16 big": b"\xfe\xff" + BASE.encode("utf-16-be"),
    "blanks": BASE.replace(",", " , "),
    "quotes": "\n".join([HEADER, *(",".join(f'"{c}"' for c in row) for row in ROWS)]),
    "no last newline": BASE.rstrip(),
    "blank lines": BASE.replace("\n", "\n\n") + "\n,,\n",
    "a spreadsheet's separator line": "sep=;\n" + BASE.replace(",", ";"),
    "comments first": "# made by hand\n#\n" + BASE,
    "trailing commas": "\n".join(line + ("," if i else "") for i, line in enumerate(BASE.splitlines())),
    "trailing commas and header": BASE.replace("\n", ",\n"),
    "exponents": "\n".join([HEADER, *(f"{float(a)!r},{float(b):.12e},{c}e0" for a, b, c in ROWS)]),
    "thousands": "\n".join([HEADER, *(f"{grouped(a)},{grouped(b)},{c}" for a, b, c in ROWS)]),
    "decimal commas": BASE.replace(",", ";").replace(".", ","),
    "an own column reason": "\n".join(
        [f"{HEADER},reason", *(",".join(row) + ("," if i % 2 else ",baseline") for i, row in enumerate(ROWS))]
    ),
    "an index": "\n".join(["," + HEADER, *(f"{i}," + ",".join(row) for i, row in enumerate(ROWS))]),
}


@pytest.mark.parametrize("kind", READ)
def test_every_shape_that_is_clear_is_read_alike(kind: str, tmp_path: Path) -> None:
    read = read_points_file(written(tmp_path, READ[kind]), MAP)
    np.testing.assert_allclose(read.points[["n_active", "tokens", "loss_nats"]].to_numpy(float), VALUES)


def changed(line: int, column: int, cell: str) -> str:
    """The base table with one cell replaced; the first row is line 2."""
    table = [list(row) for row in ROWS]
    table[line - 2][column] = cell
    return "\n".join([HEADER, *(",".join(row) for row in table)])


REFUSED: dict[str, tuple[str | bytes, dict[str, str], str]] = {
    "two headers": (BASE.replace("tokens", "loss", 1), {}, "2 columns are called loss (columns 2 and 3)"),
    "two headers but for blanks": ("a,b, b\n1,2,3\n", {}, "called b (columns 2 and 3)"),
    "two headers but for a mark": ("\ufeffa,\ufeffa\n1,2\n", {}, "called a"),
    "two to one": (
        "p,t,x,y\n1,2,3,4\n",
        {"x": "loss_nats", "y": "loss_nats"},
        "x, y cannot all be loss_nats",
    ),
    "to one there": ("p,tokens,x\n1,2,3\n", {"x": "tokens"}, "has a column 'tokens' already"),
    "unknown": (BASE, {"parms": "n_active"}, "did you mean params"),
    "longer": (BASE.replace(ROWS[3][2], ROWS[3][2] + ",1.5", 1), {}, "line 5: 4 fields under 3 names"),
    "shorter": (BASE.replace("," + ROWS[3][2], "", 1), {}, "line 5: 2 fields under 3 names"),
    "longer after blank lines": ("a,b\n\n\n1,2\n\n1,2,3\n", {}, "line 6: 3 fields"),
    "empty": ("", {}, "is empty"),
    "blank": (" \n\n", {}, "is empty"),
    "header only": (HEADER + "\n", {}, "a header and no rows"),
    "comments only": (HEADER + "\n# 1,2,3\n", {}, "a header and no rows but comments"),
    "no header": ("\n".join(BASE.splitlines()[1:]), {}, "line 1: numbers where the names"),
    "header as a comment": ("# " + BASE, {}, "line 2: numbers where the names"),
    "one column": (BASE.replace(",", "  "), {}, "is one column"),
    "two separators": ("a;b,c\n1;2,3\n", {}, "both comma and semicolon"),
    "both decimal marks": (
        "params;tokens;loss\n1.234;1000000;2,71\n2.345;2000000;2,69\n",
        MAP,
        "'1.234' has a point in a file with decimal commas",
    ),
    "ambiguous thousands": (changed(7, 2, '"2,711"'), MAP, "line 7, column loss: '2,711' has a comma"),
    "European": (changed(7, 1, '"1.234.567,5"'), {}, "line 7, column tokens: '1.234.567,5' has a comma"),
    "points": (changed(7, 1, "1.234.567"), {}, "is not a plain number"),
    "spaces": (changed(7, 1, "1 234 567"), {}, "is not a plain number"),
    "underscores": (changed(7, 1, "1_234_567"), {}, "is not a plain number"),
    "apostrophes": (changed(7, 1, "1'234'567"), {}, "is not a plain number"),
    "boolean": (changed(9, 2, "True"), MAP, "line 9, column loss: 'True' is a boolean"),
    "hexadecimal": (changed(9, 0, "0x1F"), MAP, "line 9, column params: '0x1F' is hexadecimal"),
    "percent": (changed(9, 2, "45 %"), MAP, "is a percentage"),
    "unit": (changed(9, 0, "7B"), MAP, "column params: '7B' has the unit B"),
    "words after it": (changed(9, 0, "7e9 parameters"), MAP, "is not a plain number"),
    "date": (changed(9, 2, "2024-01-01"), MAP, "is not a plain number"),
    "open quote": (HEADER + '\n1,2,3\n1,"2,3\n', {}, "line 3: unexpected end"),
    "Latin-1": (BASE.encode() + b"\xe9,1,2\n", {}, "line 16: not utf-8"),
    "UTF-16 without a mark": (BASE.encode("utf-16-le"), {}, "line 1: a NUL character"),
    "gzip": (b"\x1f\x8b\x08\x00", {}, "is gzip"),
    "Parquet": (b"PAR1" + bytes(8), {}, "is Parquet"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_every_shape_that_is_not_is_an_error_with_its_place(kind: str, tmp_path: Path) -> None:
    content, rename, said = REFUSED[kind]
    with pytest.raises(LawError) as error:
        read_points_file(written(tmp_path, content), rename)
    assert said in error.value.message + error.value.hint
    assert error.value.hint


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ('[{"a": 1, "a": 2}]', "record 1: the key a is there twice"),
        ('[{"a": 1, " a": 2}]', "the key a is there twice"),
        ('[{"a": 1}, {"b": 1}]', "record 2: a, b is in some records"),
        ('[{"a": 1}, {"a": 1, "b": 1}]', "record 2: b is in some records"),
        ('[{"a": {"b": 1}}]', "record 1, column a: a nested value"),
        ('[{"a": 1}, {"a": [1]}]', "record 2, column a: a nested value"),
        ('[{"tokens": true}]', "record 1, column tokens: True is a boolean"),
        ('[{"tokens": "7B"}, {"tokens": 7e9}]', "'7B' has the unit B"),
        ('[{"a": 1}, 2]', "record 2 is no object"),
        ('{"a": 1}', "no list of records"),
        ("[]", "no list of records"),
        ("[{]", "is no JSON"),
        (f'[{{"a": {"9" * 5000}}}]', "is no JSON"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_json_is_as_strict(records: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(LawError) as error:
        read_points_file(written(tmp_path, records, "points.json"), {})
    assert said in error.value.message


def test_json_nan_and_null_are_missing_and_an_infinity_is_one(tmp_path: Path) -> None:
    text = (
        '[{"loss_nats": NaN}, {"loss_nats": null}, {"loss_nats": -Infinity}, {"loss_nats": 1'
        + "0" * 400
        + "}]"
    )
    values = read_points_file(written(tmp_path, text, "a.json"), {}).points["loss_nats"].tolist()
    assert [math.isnan(v) for v in values] == [True, True, False, False]
    assert values[2:] == [-math.inf, math.inf]


def test_a_name_stays_as_written(tmp_path: Path) -> None:
    file = written(tmp_path, "run,run_id,seed,note\n007,1e5,3,x\n7,100000,4,\n")
    points = read_points_file(file, {}, ["run"]).points
    assert points["run"].tolist() == ["007", "7"]
    assert points["run_id"].tolist() == ["1e5", "100000"]
    assert points["seed"].tolist() == [3, 4]


def fit(file: Path, *more: str) -> dict[str, Any]:
    arguments = ["laws", "fit", "--dry-run", "--json", "--bootstrap", "60", "--points", str(file), *more]
    done = CliRunner().invoke(app, arguments)
    if done.exception is not None:
        raise done.exception

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    found: dict[str, Any] = json.loads(done.stdout, parse_constant=no_constant)
    kept = ("understood", "refused", "parameters", "intervals_90", "findings", "healthy")
    assert set(kept) < set(found)
    return found


NAMES = ("--map", "params=n_active", "--map", "loss=loss_nats")


def test_a_row_without_a_number_is_refused_by_its_line(tmp_path: Path) -> None:
    lines = BASE.splitlines()
    for line, cell in ((3, "diverged"), (5, "inf"), (6, ""), (8, "nan"), (9, "-1"), (10, "N/A")):
        lines[line - 1] = lines[line - 1].rpartition(",")[0] + "," + cell
    lines[12] = "# " + lines[12]
    lines.insert(3, "")  # the lines after it are one further down, as an editor counts
    lines += [",".join(row) for row in rows(30)[14:]]
    found = fit(written(tmp_path, "\n".join(lines)), *NAMES)
    assert found["refused"] == [
        {"row": 3, "reason": "loss_nats is 'diverged', not a number"},
        {"row": 6, "reason": "loss_nats is infinite"},
        {"row": 7, "reason": "loss_nats is missing or not a number"},
        {"row": 9, "reason": "loss_nats is missing or not a number"},
        {"row": 10, "reason": "loss_nats is not positive"},
        {"row": 11, "reason": "loss_nats is missing or not a number"},
        {"row": 14, "reason": "the line is a comment (it begins with #)"},
    ]
    assert found["understood"]["rows"] == 30
    assert found["understood"]["used"] == 23
    assert set(found["intervals_90"]) == set(found["parameters"])
    assert found["understood"]["mapping"] == MAP
    assert found["understood"]["separator"] == "comma"


def test_an_own_column_reason_refuses_nothing_and_ours_does(tmp_path: Path) -> None:
    table = rows(16)
    own = "\n".join([f"{HEADER},reason", *(",".join(row) + ",why" for row in table)])
    assert fit(written(tmp_path, own), *NAMES)["refused"] == []
    ours = (
        own.replace("reason", REFUSAL).replace("why", "").replace(table[2][2] + ",", table[2][2] + ",cut off")
    )
    assert fit(written(tmp_path, ours), *NAMES)["refused"] == [{"row": 4, "reason": "cut off"}]


def test_when_no_row_is_usable_the_error_says_why(tmp_path: Path) -> None:
    file = written(tmp_path, HEADER + "\n1e9,2e10,oom\n1e9,3e10,oom\n1e9,,2.1\n")
    with pytest.raises(
        LawError, match=r"loss_nats is 'oom', not a number \(row 2 and 1 more\); tokens is missing"
    ):
        fit(file, *NAMES)


@pytest.mark.parametrize(
    "maps",
    [
        ("params=n_active", "params=n_total"),
        ("params",),
        ("=n_active",),
        ("params=",),
        ("params=n_active", "tokens=n_active"),
        ("params=size",),
        ("absent=n_active",),
    ],
)
def test_a_wrong_map_is_an_error(maps: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(LawError) as error:
        fit(written(tmp_path, BASE), *(part for text in maps for part in ("--map", text)))
    assert error.value.hint


def test_a_dry_run_needs_no_home_no_tracker_and_no_name(tmp_path: Path) -> None:
    file = written(tmp_path, "\n".join([HEADER, *(",".join(row) for row in rows(30))]))
    code = (
        "import sys, json\nfrom escala.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'mlflow', 'ray', 'sqlalchemy', 'torch'} & set(sys.modules), set(sys.modules)"
    )
    (tmp_path / "home").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ESCALA", "MLFLOW"))}
    arguments = ["laws", "fit", "--dry-run", "--points", str(file), *NAMES, "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**environment, "HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["healthy"] is True
    assert not any((tmp_path / "home").iterdir())


def test_the_law_is_shown_with_what_was_understood(tmp_path: Path) -> None:
    lines = "\n".join([HEADER, *(",".join(row) for row in rows(30)), "1e9,2e10,oom"])
    file = written(tmp_path, lines.replace(",", ";"))
    said = CliRunner().invoke(app, ["laws", "fit", "--dry-run", "--points", str(file), *NAMES]).stdout
    for part in ("separator    semicolon", "params = n_active", "row 32: loss_nats is 'oom'", "not stored"):
        assert part in said, said


def test_a_law_that_is_stored_needs_a_name(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["laws", "fit", "--points", str(written(tmp_path, BASE))])
    assert isinstance(done.exception, EscalaError)
    assert "no name" in done.exception.message
