"""Tables of other tools and other ways to write numbers: read as meant, or refused with the fix."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from escala.contract.errors import LawError
from escala.laws import cells, scales
from escala.laws.files import REFUSAL, read_points_file, together, with_constants
from escala.laws.queries import preview_file

SIZES = [1e7, 3e7, 1e8, 3e8, 1e9, 3e9]
TOKENS = [2e9, 1e9, 8e9, 4e9, 3e10, 2e10]


def where(i: int) -> str:
    return f"cell {i}"


def loss(n: float, d: float) -> float:
    return float(1.8 + 480 * n**-0.35 + 2000 * d**-0.36)


def written(path: Path, text: str, name: str = "points.csv") -> Path:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(text)
    return path / name


MARKS = {"spaces": " ", "apostrophes": "'", "underscores": "_", "narrow spaces": "\u202f"}


@given(
    numbers=st.lists(st.integers(0, 10**13), min_size=1, max_size=8).filter(lambda n: max(n) > 999),
    mark=st.sampled_from(sorted(MARKS)),
)
@settings(max_examples=100, deadline=None)
def test_a_column_in_one_style_is_read_as_meant(numbers: list[int], mark: str) -> None:
    column = [f"{number:,}".replace(",", MARKS[mark]) for number in numbers]
    found = cells.style(column)
    assert found is not None
    assert [cells.in_style(cell, found) for cell in column] == numbers


@given(numbers=st.lists(st.floats(0.001, 1e6).map(lambda x: round(x, 4)), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_decimal_commas_are_read_rightly_or_refused(numbers: list[float]) -> None:
    column = [f"{number:.4f}".replace(".", ",") for number in numbers]
    assert cells.style(column) == cells.DECIMAL_COMMAS
    assert [cells.in_style(cell, cells.DECIMAL_COMMAS) for cell in column] == numbers
    short = [f"{number:.3f}".replace(".", ",") for number in numbers]  # 2,711: thousands, or a decimal?
    if cells.style(short) is None:
        with pytest.raises(LawError, match="may separate thousands or decimals"):
            cells.quantities(short, where)


@given(st.lists(st.text("0123456789.,_' eEkKMBT-+", max_size=9), min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_no_text_is_an_error_of_the_program(column: list[str]) -> None:
    found = cells.style(column)
    if found is not None:
        assert all(math.isfinite(cells.in_style(c, found)) or cells.is_missing(c) for c in column)
        return
    with suppress(LawError):
        cells.quantities(column, where)


def test_suffixes_of_a_whole_column_are_units_and_of_a_part_an_error() -> None:
    assert cells.style(["7B", "13 B", "300M", ""]) == cells.SUFFIXES
    assert cells.in_style("300M", cells.SUFFIXES) == 3e8
    assert cells.style(["7B", "7000000000"]) is None
    assert cells.style(["1.2.3B", "7B"]) is None


@pytest.mark.parametrize(
    ("header", "quantity", "factor"),
    [
        ("params (B)", "n_active", 1e9),
        ("tokens [M]", "tokens", 1e6),
        ("N (1e9)", "n_active", 1e9),
        ("D (x10^9)", "tokens", 1e9),
        ("Tokens (billions)", "tokens", 1e9),
        ("Tokens (B tokens)", "tokens", 1e9),
        ("tokens in millions", "tokens", 1e6),
        ("C (PFLOPs)", "compute_flops", 1e15),
        ("C (PF-days)", "compute_flops", 8.64e19),
        ("E (kWh)", "energy_joules", 3.6e6),
        ("params (non-embedding)", "n_active", None),
        ("loss (nats)", "loss_nats", None),
        ("params", "n_active", None),
    ],
)
def test_units_of_headers(header: str, quantity: str, factor: float | None) -> None:
    assert scales.factor_of(header, quantity) == factor


def test_a_unit_that_the_cells_contradict_is_an_error(tmp_path: Path) -> None:
    file = written(tmp_path, "params (B),tokens\n7000000000,1e11\n")
    with pytest.raises(LawError, match="as the header says"):
        read_points_file(file, {"params (B)": "n_active"})
    both = written(tmp_path, "params (B),tokens\n7B,1e11\n")
    with pytest.raises(LawError, match="has the unit B"):
        read_points_file(both, {"params (B)": "n_active"})
    with pytest.raises(LawError, match="not in nats"):
        read_points_file(written(tmp_path, "loss (bits),tokens\n2,1e9\n"), {"loss (bits)": "loss_nats"})


def test_a_table_of_runs_of_wandb(tmp_path: Path) -> None:
    rows = [
        f'"run-{i}","{"crashed" if i == 2 else "finished"}","{n / 1e6:g}M","{d / 1e9:g}","{loss(n, d):.5f}","9.9"'
        for i, (n, d) in enumerate(zip(SIZES, TOKENS, strict=True))
    ]
    head = '"Name","State","config.n_params","config.tokens (B)","summary.eval/loss","summary.loss"'
    read = read_points_file(written(tmp_path, "\n".join([head, *rows])), {})
    assert read.understood["format"] == "wandb runs"
    assert read.understood["assumed"] == ["a dense model: config.n_params is n_active"]
    assert read.points["n_active"].tolist() == SIZES
    assert read.points["tokens"].tolist() == TOKENS
    assert read.points[REFUSAL].dropna().to_dict() == {4: "the run is not finished (State is crashed)"}
    assert read.points["loss_nats"].iloc[0] == pytest.approx(loss(SIZES[0], TOKENS[0]), abs=1e-5)
    two = written(tmp_path, "Name,State,params,tokens,eval_loss,val_loss\na,finished,1e8,1e9,3,3.1\n")
    with pytest.raises(LawError, match="could each be loss_nats") as error:
        read_points_file(two, {})
    assert "--map" in error.value.hint
    assert read_points_file(two, {"val_loss": "loss_nats"}).points["loss_nats"].tolist() == [3.1]
    chart = written(tmp_path, '"Step","a - eval/loss","a - eval/loss__MIN","a - eval/loss__MAX"\n1,2,2,2\n')
    with pytest.raises(LawError, match="export of a chart of wandb"):
        read_points_file(chart, {})


def test_runs_of_mlflow_as_csv_and_json(tmp_path: Path) -> None:
    head = "run_id,status,params.n_active,params.tokens,metrics.val_loss,tags.user"
    rows = [f"r{i},{'RUNNING' if i else 'FINISHED'},1e8,2e9,{3 + i},me" for i in range(2)]
    table = read_points_file(written(tmp_path, "\n".join([head, *rows])), {})
    runs = [
        {
            "info": {"run_id": f"r{i}", "status": "RUNNING" if i else "FINISHED"},
            "data": {
                "params": {"n_active": "1e8", "tokens": "2e9"},
                "metrics": [{"key": "val_loss", "value": 3.0 + i}],
            },
        }
        for i in range(2)
    ]
    listed = read_points_file(written(tmp_path, json.dumps(runs), "runs.json"), {})
    for read in (table, listed):
        assert read.understood["format"] == "MLflow runs"
        assert read.points["loss_nats"].tolist() == [3.0, 4.0]
        assert read.points["n_active"].tolist() == [1e8, 1e8]
        assert "RUNNING" in read.points[REFUSAL].iloc[1]
    with pytest.raises(LawError, match="no run finished"):
        read_points_file(written(tmp_path, head + "\nr,FAILED,1e8,2e9,3,me\n"), {})


def state(n: float) -> str:
    history = []
    for step in (1, 2, 4, 8):
        seen = step * 5e8
        history.append({"step": step, "epoch": step / 8, "loss": 9.9, "num_input_tokens_seen": seen})
        history.append({"step": step, "epoch": step / 8, "eval_loss": loss(n, seen)})
    return json.dumps({"global_step": 8, "log_history": history})


def test_trainer_states_with_what_they_do_not_say(tmp_path: Path) -> None:
    files = [
        f"{written(tmp_path, state(n), f'm{i}/trainer_state.json')}::n_active={n}"
        for i, n in enumerate(SIZES)
    ]
    found = preview_file(files, bootstrap=0)
    assert found.understood["group"] == "run_id"
    assert found.understood["used"] == 4 * len(SIZES)
    assert found.law.parameters["alpha"] == pytest.approx(0.35, abs=0.01)
    assert list(found.understood["first_rows"]) == [f"trainer_state.json (1):{i}" for i in (1, 2, 3)]
    with pytest.raises(LawError, match="no eval_loss"):
        read_points_file(written(tmp_path, '{"log_history": []}', "empty.json"), {})


def test_constants_are_checked(tmp_path: Path) -> None:
    file = written(tmp_path, "tokens,loss_nats\n1e9,3\n")
    assert with_constants(f"{file}::n_active=1e8") == (file, {"n_active": 1e8})
    for text in ("::n_active", "::n_active=big", "::=3", "::n_active=1,n_active=2"):
        with pytest.raises(LawError, match="is not COLUMN=NUMBER"):
            with_constants(f"{file}{text}")
    with pytest.raises(LawError, match="has the column tokens already"):
        read_points_file(file, {}, constants={"tokens": 1e9})
    with pytest.raises(LawError, match="no column 'n_activ'"):
        read_points_file(file, {}, constants={"n_activ": 1e9})
    one = read_points_file(file, {}, constants={"n_active": 1e8})
    assert one.points["n_active"].tolist() == [1e8]
    assert together([one]) is one
    assert together([one, one]).points.index.tolist() == ["points.csv (1):2", "points.csv (2):2"]
