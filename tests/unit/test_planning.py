"""Plans and proposals from the command line, on a law that this home has cached."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from escala.cli.main import app
from escala.contract.errors import LawError, SpecError, StateError, VersionError
from escala.laws import fit_law
from escala.laws.reference import Cache, Stored
from escala.planning.explore import Exploration, _next, _open, _planned_flops, fitting, width_at
from escala.planning.limits import Budget, Limits
from escala.planning.plans import PlanOptions, Proposed, base_of, chi_of, config_for, plan_law, propose_runs
from escala.planning.propose import Proposal, candidates, propose
from escala.schema import ModelConfig, PretrainConfig
from escala.schema.flops import flops_per_token, parameter_counts
from escala.settings import Settings
from escala.sweeps import recipes

URI = "http://127.0.0.1:9"  # nothing listens there
CONFIGURATION: dict[str, Any] = {  # as a sweep stores it
    "model": {"vocab_size": 320, "max_context_tokens": 64, "n_heads": 4},
    "data": {"tokenizer": {"vocab_size": 320}, "allow_repeats": True},
    "training": {
        "context_tokens": 64,
        "optimizer": {"warmup_steps": None, "learning_rate": 0.01},
        "seed": 0,
    },
}


@pytest.fixture(scope="module")
def stored() -> Stored:
    rng = np.random.default_rng(0)
    compute, ratio = 10 ** rng.uniform(11, 13, 24), 20 * 10 ** rng.uniform(-0.75, 0.75, 24)
    frame = pd.DataFrame({"n_active": np.sqrt(compute / 6 / ratio)})
    frame["tokens"] = compute / 6 / frame.n_active
    clean = 1.2 + 80 * frame.n_active**-0.45 + 1600 * frame.tokens**-0.58
    frame["loss_nats"] = clean * np.exp(0.003 * rng.standard_normal(24))
    return Stored("tiny", 1, fit_law(frame, bootstrap=100), {"format": 2, "configuration": CONFIGURATION})


@pytest.fixture
def home(stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ESCALA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    cache = Cache(tmp_path / "home", URI)
    cache.put(stored)
    cache.put(Stored("table", 1, stored.law, {"configuration": None}))
    cache.set_champion("tiny", 1)
    return tmp_path


def ask(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_the_configuration_of_a_law_s_runs_comes_back_without_what_the_recipe_decides(stored: Stored) -> None:
    assert base_of(stored) == {
        "model": {"vocab_size": 320, "max_context_tokens": 64},
        "data": {"tokenizer": {"vocab_size": 320}, "allow_repeats": True},
        "training": {"context_tokens": 64},
    }
    config = PretrainConfig.model_validate(config_for(stored, 56_000, 56_000, 2e6, ["resources.workers=2"]))
    assert parameter_counts(config.model).n_total == pytest.approx(56_000, rel=0.15)
    assert config.train_tokens == pytest.approx(2e6, rel=0.01)
    assert config.resources.workers == 2


def test_what_the_space_stated_is_kept_and_what_the_recipe_decided_is_not(stored: Stored) -> None:
    training = {**CONFIGURATION["training"], "batch_sequences": 8, "micro_batch_sequences": 4, "steps": 90}
    shared = {**CONFIGURATION, "training": training}
    said = ["training.batch_sequences", "training.optimizer.learning_rate", "training.steps", "training.seed"]
    recipe = base_of(replace(stored, provenance={"configuration": shared}))["training"]
    assert recipe == {"context_tokens": 64}
    kept = replace(stored, provenance={"configuration": shared, "stated": said})
    assert base_of(kept)["training"] == {
        "context_tokens": 64,
        "batch_sequences": 8,
        "optimizer": {"learning_rate": 0.01},
    }
    config = PretrainConfig.model_validate(config_for(kept, 56_000, 56_000, 2e6))
    assert config.training.batch_sequences == 8
    assert config.training.optimizer.learning_rate == 0.01


def test_a_planned_mixture_has_the_experts_that_both_sizes_say(stored: Stored) -> None:
    model = {**CONFIGURATION["model"], "moe": {"chosen": 1, "capacity_factor": 1.25}}
    mixture = replace(stored, provenance={"configuration": {**CONFIGURATION, "model": model}})
    for total in (90_000, 400_000):
        config = PretrainConfig.model_validate(config_for(mixture, 50_000, total, 2e6))
        counts = parameter_counts(config.model)
        assert config.model.moe
        assert config.model.moe.chosen == 1
        assert counts.n_active == pytest.approx(50_000, rel=0.15)
        assert counts.n_total == pytest.approx(total, rel=0.15)


def test_chi_is_the_recipe_s_attention(stored: Stored) -> None:
    chi = chi_of(stored)
    model = ModelConfig(vocab_size=320, n_layers=4, d_model=96, n_heads=6, max_context_tokens=64)
    n = parameter_counts(model).n_total
    exact = flops_per_token(model, 64).attention / 6 / n
    assert chi.scale * 64 * n**-chi.exponent == pytest.approx(exact, rel=0.3)
    assert 0.2 < chi.exponent < 0.6


def test_chi_of_a_window_saturates(stored: Stored) -> None:
    model = {**CONFIGURATION["model"], "max_context_tokens": 4096, "window_tokens": 64}
    windowed = replace(stored, provenance={"configuration": {**CONFIGURATION, "model": model}})
    base, chi = base_of(windowed)["model"], chi_of(windowed, 4096)
    built = ModelConfig(**{**base, **recipes.shape(1e6, base)})
    n = parameter_counts(built).n_active
    exact = flops_per_token(built, 4096).attention / 6 / n
    assert chi.scale * 4096 * n**-chi.exponent == pytest.approx(exact, rel=0.2)
    assert chi_of(stored, 4096).scale == pytest.approx(chi_of(stored).scale)
    assert chi_of(stored, 4096).scale > 10 * chi.scale


def test_a_plan_names_what_binds_and_what_it_assumes(home: Path) -> None:
    free = json.loads(ask("laws", "plan", "tiny", "--compute-flops", "1e14", "--json"))
    assert free["binding"] == ["compute_flops"]
    spent = 6 * free["n_active"] * free["tokens"] * free["chi"]
    assert spent == pytest.approx(1e14)
    assert free["chi"] > 1.01
    small = json.loads(
        ask("laws", "plan", "tiny", "--compute-flops", "1e14", "--max-params", "1e5", "--json")
    )
    assert small["n_total"] == pytest.approx(1e5)
    assert set(small["binding"]) == {"compute_flops", "max_params"}
    shown = ask("laws", "plan", "tiny", "--compute-flops", "1e14", "--data-tokens", "1e6")
    assert "epochs, worth" in shown
    assert "binding         compute_flops, data_tokens" in shown


def test_dollars_hours_and_energy_come_from_the_cluster(home: Path) -> None:
    answer = json.loads(ask("laws", "plan", "tiny", "--usd", "10", "--cluster", "h100-8", "--json"))
    assert answer["cost_usd"] == pytest.approx(10)
    assert answer["wall_seconds"] == pytest.approx(3600 * 10 / (8 * 2.5))
    assert answer["energy_joules"] > 0
    assert any("not measured here" in text for text in answer["assumed"])
    with pytest.raises(SpecError, match="no precision"):
        ask("laws", "plan", "tiny", "--usd", "10", "--precision", "fp8")
    with pytest.raises(LawError, match="no budget"):
        ask("laws", "plan", "tiny")


def test_memory_bounds_the_model(home: Path) -> None:
    free = json.loads(ask("laws", "plan", "tiny", "--compute-flops", "1e24", "--json"))
    bound = json.loads(
        ask(
            "laws",
            "plan",
            "tiny",
            "--compute-flops",
            "1e24",
            "--cluster",
            "h100-8",
            "--max-memory-gb",
            "8",
            "--json",
        )
    )
    assert bound["n_total"] < free["n_total"]
    assert "device memory" in bound["binding"]
    assert 1e9 < bound["n_total"] < 5e9  # 8 GB x 8 devices, 18 bytes a parameter, and what is gathered


def test_a_target_loss_has_its_compute_and_its_energy(home: Path) -> None:
    there = json.loads(ask("laws", "plan", "tiny", "--compute-flops", "1e14", "--json"))
    answer = json.loads(
        ask("laws", "plan", "tiny", "--target-loss", str(there["loss_nats"]), "--cluster", "h100-8", "--json")
    )
    assert answer["compute_flops"] == pytest.approx(1e14, rel=1e-6)
    assert answer["energy_low_joules"] < answer["energy_joules"] < answer["energy_high_joules"]
    with pytest.raises(LawError, match="asks for the budget"):
        ask("laws", "plan", "tiny", "--target-loss", "2", "--usd", "1")


def test_a_plan_says_how_many_workers_pay(home: Path) -> None:
    asked = ("laws", "plan", "tiny", "--compute-flops", "1e16")
    assert json.loads(ask(*asked, "--json"))["workers"] is None
    assert "\nworkers " not in ask(*asked)
    assert "unknown: no cluster" in ask(*asked, "--workers")
    asked += ("--cluster", "h100-8")
    shown = ask(*asked)
    assert re.search(
        r"^workers         P\* = \d+, \S+ hours, \S+ kWh, \S+ USD, in bf16: P T\^2 is ", shown, re.M
    )
    assert "by the number of workers" not in shown
    table = ask(*asked, "--workers", "--max-workers", "64")
    assert "-dlnT/dlnP" in table
    assert "the run is configured like the law's runs" in table
    answer = json.loads(ask(*asked, "--max-workers", "64", "--json"))
    bf16, fp32 = answer["workers"]
    assert (bf16["precision"], fp32["precision"], bf16["max_workers"]) == ("bf16", "fp32", 64)
    one, plan_hours = bf16["rows"][0], 8 * answer["wall_seconds"]
    assert (
        plan_hours < one["wall_seconds"] < 1.5 * plan_hours
    )  # update, whole steps, the shape that was found
    table = json.loads(ask("laws", "plan", "table@1", *asked[3:], "--json"))
    assert "the law has no configuration" in table["workers"][0]["notes"][0]


def test_joules_to_a_loss_by_workers_and_precision(home: Path) -> None:
    asked = ("laws", "plan", "tiny", "--target-loss", "1.4", "--cluster", "h100-8", "--workers")
    shown = ask(*asked)
    assert "kWh, bf16" in shown
    assert "kWh, fp32" in shown
    answer = json.loads(ask(*asked, "--json"))
    for curve in answer["workers"]:
        for row in curve["rows"]:
            low = answer["tokens_low"] / answer["tokens"]
            assert row["energy_low_joules"] == pytest.approx(row["energy_joules"] * low)
            assert row["energy_low_joules"] < row["energy_joules"] < row["energy_high_joules"]
    bf16, fp32 = (curve["rows"][0]["energy_joules"] for curve in answer["workers"])
    assert bf16 < fp32  # the same FLOPs, at a fifteenth of the speed: static power
    assert bf16 == pytest.approx(answer["energy_joules"], rel=0.5)


def test_a_plan_s_run_that_fits_nowhere_is_made_to(home: Path) -> None:
    asked = ("laws", "plan", "tiny", "--compute-flops", "1e17", "--cluster", "h100-8", "--max-memory-gb", "2")
    curve = json.loads(ask(*asked, "--json"))["workers"][0]
    assert any("does not fit as configured" in note for note in curve["notes"])
    assert all(row["memory_bytes"] <= 2e9 for row in curve["rows"] if row["fits"])
    assert any(row["activation_checkpointing"] and row["fits"] for row in curve["rows"])


def test_the_front_is_a_table_and_a_plot(home: Path) -> None:
    path = home / "front.png"
    shown = ask("laws", "plan", "tiny", "--compute-flops", "1e14", "--front", str(path))
    assert path.stat().st_size > 5000
    assert len([line for line in shown.splitlines() if line.startswith(("1e+", "5.6", "3.1", "1.7"))]) >= 5


def test_a_proposal_says_what_it_expects_and_by_which_formula(home: Path) -> None:
    arguments = ("propose", "tiny", "--target-flops", "1e16", "--max-flops", "1e13")
    answer = json.loads(ask(*arguments, "--count", "2", "--json"))
    first, second = answer["proposals"]
    assert max(first["compute_flops"], second["compute_flops"]) <= 1e13
    assert second["width_expected"] < first["width_expected"] < first["width_now"]
    assert "MacKay" in ask(*arguments)
    dollars = json.loads(ask(*arguments, "--unit", "USD", "--cluster", "h100-8", "--json"))["proposals"][0]
    assert dollars["unit"] == "USD"
    assert dollars["cost"] == pytest.approx(2.5 * 8 / 3600 * dollars["compute_flops"] / (8 * 0.4 * 989.4e12))
    with pytest.raises(SpecError, match="no unit"):
        ask(*arguments, "--unit", "EUR")


@pytest.mark.parametrize("limits", [{}, {"max_params": 1e5}, {"data_tokens": 1e6, "inference_tokens": 1e9}])
def test_plan_proposal_and_exploration_aim_at_the_same_point(
    home: Path, stored: Stored, limits: dict[str, float]
) -> None:
    """The runs of this law share a context, so attention counts (chi), and the limits hold for all three."""
    target = Limits(compute_flops=1e14, **limits)
    plan = plan_law(Settings(), "tiny", target).plan
    assert plan.chi > 1.01
    found = propose_runs(Settings(), "tiny", target, 1e13)
    assert found.plan == plan
    mean = stored.law.predict_mean(0.9, **plan.point("n_active"))
    assert mean.low_nats is not None
    assert mean.high_nats is not None
    width = (mean.high_nats - mean.low_nats) / mean.loss_nats
    assert width_at(Settings(), "tiny", target) == width
    assert found.proposals[0].width_now == pytest.approx(width, rel=1e-6)


def test_a_journal_of_escala_0_1_is_continued(home: Path) -> None:
    """Its target was a number of FLOPs."""
    path = home / "home" / "explore" / "tiny.json"
    path.parent.mkdir()
    old = {"name": "tiny", "law": "tiny@1", "target_flops": 1e15, "max_flops": 1e14, "budget_flops": 1e14}
    path.write_text(
        json.dumps({**old, "width": 0.02, "batch": 1, "rounds": [{"law": "tiny@1", "proposals": []}]})
    )
    asked = Exploration("tiny", "tiny@1", Limits(compute_flops=1e15), 1e13, 1e14, width=1e-3, batch=2)
    state = _open(Settings(), asked)
    assert (len(state.rounds), state.batch, state.target) == (1, 2, asked.target)
    assert _open(Settings(), asked) == state
    with pytest.raises(StateError, match="another target: compute_flops"):
        _open(Settings(), replace(asked, target=Limits(compute_flops=1e16)))
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9}))
    with pytest.raises(VersionError, match="format 9"):
        _open(Settings(), asked)


def test_a_law_of_a_table_can_neither_submit_nor_explore(home: Path) -> None:
    with pytest.raises(SpecError, match="does not know how its runs were configured"):
        ask("laws", "plan", "table@1", "--compute-flops", "1e14", "--submit")
    with pytest.raises(SpecError, match="does not know how its runs were configured"):
        ask("explore", "table@1", "--target-flops", "1e16", "--max-flops", "1e13", "--budget-flops", "1e14")


def test_exploration_makes_a_run_smaller_until_its_plan_fits(
    home: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the one candidate of 6 N D = what is left, attention and whole steps do not fit in it."""

    def largest(
        settings: Settings,
        law: str,
        target: Limits,
        most: float,
        options: PlanOptions,
        *,
        count: int,
        width: float,
    ) -> Proposed:
        point = {"n_active": np.sqrt([most / 120]), "tokens": 20 * np.sqrt([most / 120])}
        columns = {**point, "n_total": point["n_active"]}
        return Proposed(stored, propose(stored.law, Budget(target), columns, width=width), "", None)

    monkeypatch.setattr("escala.planning.explore.propose_runs", largest)
    said: list[str] = []
    left, settings = 1e12, Settings()
    state = _open(
        settings, Exploration("tiny", "tiny@1", Limits(compute_flops=1e15), 1e14, left, width=1e-3, batch=1)
    )
    first = largest(settings, "tiny@1", state.target, left, state.options, count=1, width=1e-3).proposals
    assert _planned_flops(settings, state, "tiny@1", list(first)) > left
    following = _next(settings, state, said.append)
    assert following is not None
    (chosen,) = (Proposal(**each) for each in following.proposals)
    assert 0.7 * left < _planned_flops(settings, state, "tiny@1", [chosen]) <= left
    assert sum("a smaller one" in line for line in said) >= 1


def test_the_next_rows_of_a_pool_are_chosen_one_after_the_other(home: Path) -> None:
    rows = pd.DataFrame({"n_active": [1e5, 1e6, 1e6], "tokens": [2e6, 2e7, 2e7], "hours": [1.0, 2.0, 1e6]})
    rows.to_csv(home / "pool.csv", index=False)
    rows.drop(columns="hours").head(1).to_csv(home / "targets.csv", index=False)
    pool = ("propose", "tiny", "--pool", str(home / "pool.csv"), "--cost", "hours", "--json")
    for target in (("--targets", str(home / "targets.csv")), ("--target-flops", "1e15")):
        answer = json.loads(ask(*pool, *target, "--count", "2"))
        assert answer["law"] == "tiny@1"
        errors = [row["expected_error"] for row in answer["rows"]]
        assert errors == sorted(errors, reverse=True)
        assert answer["rows"][0]["row"] != 2  # as row 1, at a far higher cost
    with pytest.raises(LawError, match="needs a target"):
        ask(*pool)
    with pytest.raises(LawError, match="4 rows of the 3"):
        ask(*pool, "--target-flops", "1e15", "--count", "4")


def test_a_batch_loses_its_last_runs_first_and_ends_at_the_smallest_run(stored: Stored) -> None:
    asked: list[float] = []

    def ask_for(count: int) -> Callable[[float], list[Proposal]]:
        def proposals(most: float) -> list[Proposal]:
            asked.append(most)
            return propose(stored.law, 1e15, candidates(stored.law, most), width=1e-3, count=count)

        return proposals

    batch = ask_for(3)(1e13)
    assert fitting(ask_for(3), dearer, dearer(batch[:2]), 1e13, 1e11) == batch[:2]
    assert asked == [1e13, 1e13]
    left = batch[0].compute_flops
    (run,) = fitting(ask_for(1), dearer, left, 1e13, 1e11)
    assert dearer([run]) <= left
    assert len(asked) > 3
    assert fitting(ask_for(1), dearer, 1e9, 1e12, 1e11) == []


def dearer(runs: list[Proposal]) -> float:
    return 1.3 * sum(run.compute_flops for run in runs)
