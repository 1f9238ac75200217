"""How much a table really holds: copies, checkpoints of one run, groups, replicates; and units that cannot be."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from escala.contract.errors import LawError
from escala.laws import Law, fit_law
from escala.laws.drift import check
from escala.laws.plots import figures
from escala.laws.reference import Stored

NOISE = 0.004


def truth(table: pd.DataFrame) -> np.ndarray:
    return np.asarray(1.8172 + 482.01 * table.n_active**-0.3478 + 2085.43 * table.tokens**-0.3658)


def sweep(n: int = 24, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    compute, ratio = 10 ** rng.uniform(17, 20, n), 20 * 10 ** rng.uniform(-0.75, 0.75, n)
    table = pd.DataFrame({"n_active": np.sqrt(compute / 6 / ratio).round()})
    table["tokens"] = (compute / 6 / table.n_active).round()
    return table.assign(loss_nats=(truth(table) * np.exp(NOISE * rng.standard_normal(n))).round(4))


def checkpoints(runs: int = 12, each: int = 5, own: float = 0.1) -> pd.DataFrame:
    """Points along runs: a run's noise is shared by its points, but for the part `own`."""
    rng = np.random.default_rng(7)
    size = np.repeat(np.geomspace(3e7, 1e9, runs), each)
    tokens = np.tile(np.linspace(0.2, 1.0, each), runs) * np.repeat(rng.uniform(10, 60, runs), each) * size
    table = pd.DataFrame({"n_active": size, "tokens": tokens})
    noise = np.repeat(rng.standard_normal(runs), each) + own * rng.standard_normal(runs * each)
    return table.assign(loss_nats=truth(table) * np.exp(NOISE * noise))


def widths(law: Law) -> dict[str, float]:
    return {name: high - low for name, (low, high) in law.intervals(0.9).items()}


BASE = fit_law(sweep(), bootstrap=100)

COPIES = {
    "four times": lambda t: pd.concat([t] * 4),
    "each four times in a row": lambda t: t.loc[t.index.repeat(4)],
    "with an index": lambda t: pd.concat([t] * 4, ignore_index=True).reset_index(names="row"),
    "rounded": lambda t: pd.concat([t, t.map(lambda v: float(f"{v:.3e}"))]),
    "of other seeds": lambda t: pd.concat([t.assign(seed=s) for s in range(4)]),
    "of other run ids": lambda t: pd.concat(
        [t.assign(run_id=[f"{k}-{i}" for i in range(24)]) for k in "abcd"]
    ),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_count_once(kind: str) -> None:
    law = fit_law(COPIES[kind](sweep()), bootstrap=100)
    for name, width in widths(law).items():
        assert width == pytest.approx(widths(BASE)[name], rel=0.02), name
    assert any("rows are copies" in finding for finding in law.findings)
    assert law.healthy


def test_copies_of_a_group_in_other_groups_count_once() -> None:
    table = checkpoints().assign(run=lambda t: t.n_active.rank(method="dense"))
    grouped = widths(fit_law(table, group="run", bootstrap=60))
    both = pd.concat([table, table.assign(run=table.run + 100)])
    assert widths(fit_law(both, group="run", bootstrap=60)) == pytest.approx(grouped, rel=0.02)


def test_seeds_of_one_point_are_no_copies() -> None:
    table, rng = sweep(), np.random.default_rng(3)
    seeds = [table.assign(seed=s, loss_nats=table.loss_nats * (1 + 1e-6 * rng.random(24))) for s in (1, 2)]
    law = fit_law(pd.concat(seeds), bootstrap=30)
    assert not any("copies" in finding for finding in law.findings)


def test_one_row_repeated_often_is_a_problem() -> None:
    table = sweep()
    assert not fit_law(pd.concat([table, *[table.iloc[:1]] * 20]), bootstrap=60).healthy


def test_copies_of_few_rows_are_few_rows() -> None:
    law = fit_law(pd.concat([sweep(9)] * 5), bootstrap=60)
    assert any("few points: 9 for 5" in finding for finding in law.findings)
    with pytest.raises(LawError, match="4 points cannot determine 5"):
        fit_law(pd.concat([sweep(4)] * 10), bootstrap=60)


@pytest.mark.parametrize("column", ["run_id", "run", "run_name", "runId", "trial", "wandb_run"])
def test_points_of_one_run_are_resampled_together_and_that_is_said(column: str) -> None:
    table = checkpoints().assign(**{column: lambda t: [f"r{n:.0f}" for n in t.n_active]})
    law, told = fit_law(table, bootstrap=60), fit_law(table, bootstrap=60, group=column)
    assert widths(law) == widths(told)
    assert told.healthy
    assert not law.healthy
    assert any(f"--group {column}" in finding for finding in law.findings)


def test_points_of_one_run_are_seen_without_a_name() -> None:
    law = fit_law(checkpoints(), bootstrap=60)
    assert not law.healthy
    assert any("--group" in finding for finding in law.findings)
    named = checkpoints().assign(run=lambda t: t.n_active)
    assert widths(law) == widths(fit_law(named, group="run", bootstrap=60))


def test_a_grid_of_separate_runs_is_taken_as_it_is() -> None:
    size, tokens = (v.ravel() for v in np.meshgrid(np.geomspace(3e7, 1e9, 6), np.geomspace(5e8, 3e10, 6)))
    table = pd.DataFrame({"n_active": size, "tokens": tokens})
    rng = np.random.default_rng(1)
    table["loss_nats"] = truth(table) * np.exp(NOISE * rng.standard_normal(36))
    law = fit_law(table.assign(name=[f"{n:.0e}" for n in size], experiment="mine"), bootstrap=60)
    assert law.healthy, law.findings
    assert law.findings == ()


@pytest.mark.parametrize(("groups", "trusted"), [(1, False), (2, False), (7, False), (8, True), (24, True)])
def test_few_groups_give_no_interval(groups: int, trusted: bool) -> None:
    law = fit_law(sweep().assign(family=[f"f{i % groups}" for i in range(24)]), group="family", bootstrap=60)
    assert law.has_intervals is law.healthy is trusted
    if not trusted:
        assert f"no intervals: {groups} group" in law.findings[0]


def test_one_group_that_holds_nearly_all_is_one_group() -> None:
    law = fit_law(sweep(40).assign(f=[*("b" * 31), *"cdefghijk"]), group="f", bootstrap=60)
    assert not law.has_intervals
    assert "very unequal size" in law.findings[0]


@pytest.mark.parametrize(
    ("bootstrap", "intervals", "healthy"),
    [(0, False, False), (3, False, False), (25, True, False), (60, True, True)],
)
def test_few_replicates_are_said(bootstrap: int, intervals: bool, healthy: bool) -> None:
    law = fit_law(sweep(), bootstrap=bootstrap)
    assert (law.has_intervals, law.healthy) == (intervals, healthy)


def test_replicates_without_a_fit_give_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from escala.laws import estimate

    real = estimate.replicate_fits

    def failing(*arguments: object) -> np.ndarray:
        theta_BP = real(*arguments)  # type: ignore[arg-type]
        theta_BP[::4] = np.nan
        return theta_BP

    monkeypatch.setattr(estimate, "replicate_fits", failing)
    law = fit_law(sweep(), bootstrap=60)
    assert not law.has_intervals
    assert "25% of the bootstrap replicates have no fit" in law.findings[0]


def test_a_level_that_the_replicates_cannot_give_is_refused() -> None:
    law = fit_law(sweep(), bootstrap=60)
    with pytest.raises(LawError, match="cannot give an interval of level"):
        law.predict(0.999, n_active=1e9, tokens=2e10)
    record = {"status": "succeeded", "held_out_loss_nats": 2.5, "n_active": 1e9, "train_tokens": 2e10}
    text = {"tokenizer_fingerprint": "t", "evaluation_fingerprint": "e"}
    assert check(Stored("a", 1, law, text), {**record, **text}, "r", {}, 0.0) is None  # 99 % of 60 draws


def test_a_law_without_intervals_answers_everywhere() -> None:
    law = fit_law(sweep().assign(family="one"), group="family")
    with pytest.raises(LawError, match="no intervals: 1 group"):
        law.intervals()
    assert law.predict(n_active=1e9, tokens=2e10).low_nats is None
    best = law.optimum(1e21)
    assert (best.low_nats, best.n_active_low) == (None, None)
    assert "isoflop" in figures(law)
    assert not Law.from_json(law.to_json()).has_intervals
    assert math.isnan(law.backtest().covered)
    assert json.loads(law.to_json())["replicates_BP"] == []


def test_two_columns_of_one_name_are_an_error() -> None:
    table = sweep()
    with pytest.raises(LawError, match="two columns called loss_nats"):
        fit_law(pd.concat([table, table[["loss_nats"]]], axis=1))


def test_booleans_and_dates_are_no_numbers() -> None:
    table = sweep().astype({"loss_nats": object})
    table.loc[0, "loss_nats"] = True
    table.loc[1, "loss_nats"] = pd.Timestamp("2024-01-01")
    law = fit_law(table, bootstrap=0)
    assert law.refusals == [
        (0, "loss_nats is 'True', not a number"),
        (1, "loss_nats is '2024-01-01 00:00:00', not a number"),
    ]
    assert law.points["loss_nats"].dtype == np.float64


UNITS = {
    "N in billions": (lambda t: t.assign(n_active=t.n_active / 1e9), "n_active is below 1,000 in 24 of 24"),
    "one N in billions": (
        lambda t: t.assign(n_active=t.n_active.where(t.index != 3, t.n_active / 1e9)),
        "n_active is below 1,000 in 1 of 24",
    ),
    "D in billions": (lambda t: t.assign(tokens=t.tokens / 1e9), "tokens is below 1,000"),
    "D in steps": (lambda t: t.assign(tokens=t.tokens / 1e7), "tokens is below 1,000"),
    "N in millions": (lambda t: t.assign(n_active=t.n_active / 1e6), "n_active is below 1,000"),
    "exchanged N": (
        lambda t: t.assign(n_total=t.n_active * 0.8),
        "n_total is less than n_active in 24 of 24 rows",
    ),
    "compute in petaFLOP days": (
        lambda t: t.assign(compute_flops=6 * t.n_active * t.tokens / 8.64e19),
        "compute_flops is 1.16e-20 times 6 n_active tokens",
    ),
    "compute per device": (
        lambda t: t.assign(compute_flops=6 * t.n_active * t.tokens / 64),
        "compute_flops is 0.0156 times",
    ),
    "compute times 31": (lambda t: t.assign(compute_flops=186 * t.n_active * t.tokens), "is 31 times"),
    "perplexity": (lambda t: t.assign(loss_nats=np.exp(t.loss_nats)), "perplexity"),
    "tokens per parameter": (
        lambda t: t.assign(tokens=t.tokens * 1e7),
        "tokens per parameter in the median row",
    ),
}


@pytest.mark.parametrize("kind", UNITS)
def test_units_that_contradict_each_other_are_a_problem(kind: str) -> None:
    change, said = UNITS[kind]
    law = fit_law(change(sweep()), bootstrap=40)
    assert not law.healthy
    assert any(f.startswith("units: ") and said in f for f in law.findings), law.findings


def test_an_empty_cell_hides_no_contradiction() -> None:
    table = sweep().assign(compute_flops=lambda t: 6e-15 * t.n_active * t.tokens)
    table.loc[3, "compute_flops"] = np.nan
    assert any("compute_flops is 1e-15 times" in f for f in fit_law(table, bootstrap=0).findings)


def test_units_that_agree_are_none() -> None:
    table = sweep().assign(
        compute_flops=lambda t: 29 * 6 * t.n_active * t.tokens,
        n_total=lambda t: t.n_active * 8,
        n_non_embedding=lambda t: t.n_active * 0.01,
        context_tokens=64,
    )
    assert fit_law(table, bootstrap=60).healthy
    small = table[["tokens", "loss_nats", "compute_flops"]].assign(n_non_embedding=table.n_active / 40_000)
    law = fit_law(
        small, size="n_non_embedding", bootstrap=60
    )  # embeddings are nearly all of it: no contradiction
    assert not any(f.startswith("units: ") for f in law.findings)
