"""Rows of a pool: the choice within a budget, and that no loss is read before its row is chosen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from escala.cli.main import app
from escala.contract.errors import LawError
from escala.laws.forms import FORMS, get_form
from escala.planning import pool as pools
from escala.planning.explore import Exploration, Round, _is_reached
from escala.planning.limits import Limits
from escala.planning.pool import Pool

FORM = get_form("nd")


def truth(size: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(1.7 + 400 * size**-0.34 + 410 * tokens**-0.28)


@pytest.fixture
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    size, tokens = 10 ** rng.uniform(7, 9, 60), 10 ** rng.uniform(9, 10.5, 60)
    frame = pd.DataFrame({"n_active": size, "n_total": size, "tokens": tokens, "flops": 6 * size * tokens})
    return frame.assign(loss_nats=truth(size, tokens) * np.exp(0.002 * rng.standard_normal(60)))


def pool_of(table: pd.DataFrame) -> Pool:
    rows = {"size": table.n_active.to_numpy(), "tokens": table.tokens.to_numpy()}
    targets = {"size": np.array([2e9, 3e9]), "tokens": np.array([4e10, 6e10])}
    return Pool(FORM, rows, targets, table.flops.to_numpy())


def test_the_budget_is_hard_and_only_chosen_rows_are_measured(table: pd.DataFrame) -> None:
    pool, asked = pool_of(table), list[int]()

    def measure(k: int) -> float:
        asked.append(k)
        return float(table.loss_nats[k])

    for share in (0.001, 0.03, 1.0):
        asked.clear()
        budget = share * float(table.flops.sum())
        bought = pools.explore_pool(pool, budget, measure)
        assert list(bought.rows) == asked
        assert len(set(asked)) == len(asked)
        assert bought.spent == math.fsum(table.flops[asked]) <= budget


def test_a_small_share_of_the_pool_predicts_the_targets(table: pd.DataFrame) -> None:
    pool = pool_of(table)
    bought = pools.explore_pool(pool, 0.05 * float(table.flops.sum()), lambda k: float(table.loss_nats[k]))
    found = pools.fit_rows(pool, bought.rows, bought.losses)
    expected = truth(pool.targets["size"], pool.targets["tokens"])
    assert np.abs(found.predictions_T / expected - 1).max() < 0.03
    p, size, tokens = found.parameters, pool.targets["size"], pool.targets["tokens"]
    by_formula = p["L_inf"] + p["a"] * size ** -p["alpha"] + p["b"] * tokens ** -p["beta"]
    assert found.predictions_T == pytest.approx(by_formula)
    assert "weak prior" in found.findings[0]


def test_parameters_of_the_formula_come_back_as_log_parameters(table: pd.DataFrame) -> None:
    pool = pool_of(table)
    bought = pools.explore_pool(pool, 1e-3 * float(table.flops.sum()), lambda k: float(table.loss_nats[k]))
    found = pools.fit_rows(pool, bought.rows, bought.losses)
    assert pools.log_parameters(pool, found.parameters) == pytest.approx(found.theta_P)


def test_a_near_row_is_worth_more_than_a_far_one(table: pd.DataFrame) -> None:
    near = pd.DataFrame({"n_active": [1e7, 2e9], "tokens": [1e9, 4e10], "flops": [1.0, 1.0]})
    assert pools.plan(pool_of(near), pools.prior_mean(FORM), [], 1.0) == [1]


@pytest.mark.parametrize("name", sorted(FORMS))
def test_every_form_has_a_plan(name: str) -> None:
    form, rng = FORMS[name], np.random.default_rng(1)
    columns = {each: np.sort(10 ** rng.uniform(6, 9, 12)) for each in form.columns}
    if form.mix is not None:
        columns[form.mix.over.name] = 4 * columns[form.terms[0].column]
    pool = Pool(form, columns, {each: values[-2:] * 2 for each, values in columns.items()}, np.ones(12))
    bought = pools.explore_pool(pool, 11.0, lambda k: 3.0 - 0.05 * k)
    assert len(form.names) <= len(bought.rows) <= 11
    assert np.isfinite(pools.fit_rows(pool, bought.rows, bought.losses).predictions_T).all()


def ask(folder: Path, table: pd.DataFrame, budget: float, *more: str) -> dict[str, object]:
    table.to_csv(folder / "pool.csv", index=False)
    targets = pd.DataFrame({"n_active": [2e9], "n_total": [2e9], "tokens": [4e10]})
    targets.to_csv(folder / "targets.csv", index=False)
    files = ["--pool", str(folder / "pool.csv"), "--targets", str(folder / "targets.csv")]
    done = CliRunner().invoke(
        app, ["explore", *files, "--form", "nd", "--cost", "flops", "--budget", str(budget), "--json", *more]
    )
    if done.exception is not None:
        raise done.exception
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_losses_of_other_rows_change_nothing(table: pd.DataFrame, tmp_path: Path) -> None:
    budget = 0.03 * float(table.flops.sum())
    found = ask(tmp_path, table, budget, "--seed", "3")
    chosen = found["chosen"]
    assert {"chosen", "spent", "law", "predictions"} <= set(found)
    hidden = table.astype({"loss_nats": object})
    hidden.loc[~hidden.index.isin(chosen), "loss_nats"] = "not a number"  # type: ignore[arg-type]
    assert ask(tmp_path, hidden, budget, "--seed", "3") == found


def test_a_chosen_row_without_a_loss_is_paid_and_left_out(table: pd.DataFrame, tmp_path: Path) -> None:
    budget = 0.03 * float(table.flops.sum())
    first = ask(tmp_path, table, budget)["chosen"][0]  # type: ignore[index]
    failed = table.copy()
    failed.loc[first, "loss_nats"] = np.nan
    found = ask(tmp_path, failed, budget)
    assert found["refused"] == [first]
    assert found["chosen"][0] == first  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "budget", "said"),
    [
        ({"flops": 0.0}, 1e30, "row 0, column flops"),
        ({"tokens": -1.0}, 1e30, "row 0, column tokens"),
        ({}, 1.0, "buys no row"),
        ({}, float("nan"), "buys no row"),
    ],
)
def test_what_cannot_be_bought_is_said(
    table: pd.DataFrame, tmp_path: Path, change: dict[str, float], budget: float, said: str
) -> None:
    with pytest.raises(LawError, match=said):
        ask(tmp_path, table.assign(**change), budget)


@pytest.mark.parametrize("name", ["tokens", "flops", "loss_nats"])
def test_a_missing_column_is_named(table: pd.DataFrame, tmp_path: Path, name: str) -> None:
    with pytest.raises(LawError, match=f"no column {name}"):
        ask(tmp_path, table.drop(columns=name), 1e30)


@pytest.mark.parametrize(
    "arguments",
    [
        ["explore"],
        ["explore", "tiny", "--pool", "p.csv", "--targets", "t.csv", "--cost", "c", "--budget", "1"],
        ["explore", "--pool", "p.csv"],
        ["explore", "tiny", "--target-flops", "1", "--max-flops", "1", "--budget-flops", "1", "--cost", "c"],
        ["propose", "tiny"],
        ["propose", "tiny", "--pool", "p.csv"],
    ],
)
def test_options_of_a_pool_and_of_a_law_do_not_mix(arguments: list[str]) -> None:
    with pytest.raises(LawError, match="--pool"):
        raise CliRunner().invoke(app, arguments).exception or AssertionError("it ran")


@pytest.mark.parametrize(
    ("before", "now", "reached"),
    [
        ([], 0.01, False),
        ([0.03], 0.01, False),
        ([0.01], 0.01, True),
        ([None], 0.01, False),
        ([0.01], 0.03, False),
    ],
)
def test_two_narrow_intervals_in_a_row_end_a_search(
    before: list[float | None], now: float, reached: bool
) -> None:
    state = Exploration("l", "l@1", Limits(compute_flops=1e15), 1e14, 1e16, 0.02, 2)
    assert _is_reached([], now, state) == (now <= 0.02)  # never explored: one look
    explored = Exploration("l", "l@1", state.target, 1e14, 1e16, 0.02, 2, [Round("l@1", [])])
    assert _is_reached(before, now, explored) == reached
