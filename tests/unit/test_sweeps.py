"""Spaces, designs, plans and points: everything about a sweep that needs no cluster."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from escala import spec
from escala.contract.errors import LawError, NotFoundError, SpecError
from escala.contract.records import (
    AttemptSpec,
    Control,
    JobFiles,
    Outcome,
    RunRecord,
    TrialFiles,
    TrunkFiles,
    read_record,
    write_json,
)
from escala.laws import fit_law
from escala.laws.registry import _provenance
from escala.settings import Settings
from escala.sweeps import design, launch, plan, trials
from escala.sweeps.launch import plan_sweep
from escala.sweeps.monitor import Monitor
from escala.sweeps.points import read_points
from escala.sweeps.recipes import by_recipe
from escala.sweeps.space import Space, load_space, names
from escala.sweeps.trials import PlannedTrial
from escala.sweeps.tuner import identify
from tests.conftest import wait_for

BETA2 = {"low": 0.9, "high": 1.0, "scale": "linear"}
BASE = {"model": {"vocab_size": 512, "max_context_tokens": 32}, "data": {"tokenizer": {"vocab_size": 512}}}


def space(**keys: object) -> Space:
    made: Space = spec.validate(Space, {"base": BASE, **keys}, "space")
    return made


def test_a_grid_is_the_product_of_its_axes():
    found = list(
        design.points(space(vary={"n_total": [1e5, 2e5], "tokens": {"low": 1e4, "high": 1e6, "count": 3}}))
    )
    assert found == [{"n_total": n, "tokens": d} for n in (1e5, 2e5) for d in (1e4, 1e5, 1e6)]


@pytest.mark.parametrize("kind", ["sobol", "random"])
def test_drawn_points_fill_their_ranges_and_repeat_with_their_seed(kind):
    vary = {
        "tokens": {"low": 1e4, "high": 1e8},
        "training.optimizer.beta2": BETA2,
    }
    one, again, other = (
        list(design.points(space(design=kind, points=32, vary=vary, design_seed=seed))) for seed in (1, 1, 2)
    )
    assert one == again != other
    assert len(one) == 32
    logs = sorted(math.log10(p["tokens"]) for p in one)
    assert 4 <= logs[0] < logs[-1] <= 8
    if kind == "sobol":
        assert sum(log < 6 for log in logs) == 16
    assert all(0.9 <= p["training.optimizer.beta2"] <= 1.0 for p in one)


def test_cells_are_crossed_with_the_design():
    found = list(
        design.points(space(cells=[{"n_total": 1e5}, {"n_total": 2e5}], vary={"tokens": [1e4, 1e5]}))
    )
    assert len(found) == 4
    assert {p["n_total"] for p in found} == {1e5, 2e5}


def test_isoflop_trials_of_a_budget_cost_the_same():
    vary = {"compute_flops": [1e11, 4e11], "tokens_per_parameter": [2, 8, 32]}
    found = design.plan(space(design="isoflop", vary=vary))
    assert len(found) == 6
    for budget in vary["compute_flops"]:
        costs = [t.compute_flops for t in found if t.values["compute_flops"] == budget]
        assert costs == pytest.approx([budget] * 3, rel=0.05)


def test_experts_and_capacity_vary_as_any_key_does():
    trials = design.plan(load_space("moe_capacity")[1])
    assert (
        len({(t.n_total, t.n_active, t.train_tokens, t.values["model.moe.capacity_factor"]) for t in trials})
        == 36
    )
    for t in trials:
        assert 2 < t.n_total / t.n_active < 11
        assert t.config["model"]["moe"]["experts"] == t.values["model.moe.experts"]


def test_a_plan_runs_the_costliest_first_and_nothing_twice():
    found = design.plan(
        space(
            vary={"n_total": [5e4, 1e5], "tokens": [2e4, 4e4]},
            seeds=[0, 0, 1],
            repeats={"points": 1, "seeds": [1, 2]},
        )
    )
    assert [t.compute_flops for t in found] == sorted((t.compute_flops for t in found), reverse=True)
    assert len(found) == 4 * 2 + 1
    assert len({json.dumps(t.config, sort_keys=True) for t in found}) == len(found)
    assert {t.config["training"]["seed"] for t in found} == {0, 1, 2}


def test_points_have_seeds_of_their_own_that_other_points_do_not_change():
    vary = {"n_total": [5e4, 1e5], "tokens": [2e4, 4e4]}
    own = {"own_seeds": True, "repeats": {"points": 1, "seeds": [1]}}
    found = design.plan(space(vary=vary, **own))
    seeds = [t.config["training"]["seed"] for t in found]
    assert len(set(seeds)) == len(found) == 5
    fewer = design.plan(space(vary=vary, within={"tokens": {"high": 3e4}}, **own))
    assert {t.config["training"]["seed"] for t in fewer} < set(seeds)
    other = design.plan(space(vary=vary, seeds=[7], own_seeds=True))
    assert not {t.config["training"]["seed"] for t in other} & set(seeds)
    branches = design.plan(space(**BRANCHED, own_seeds=True))  # they share their trunk's
    assert len({(t.n_total, t.config["training"]["seed"]) for t in branches}) == 2
    with pytest.raises(SpecError, match="own_seeds"):
        space(aim="search", design="optuna", points=3, vary=vary, own_seeds=True)


def test_bounds_leave_points_out_and_an_empty_plan_is_an_error():
    vary = {"n_total": [5e4, 2e5], "tokens": [2e4, 4e5]}
    whole = design.plan(space(vary=vary))
    limit = sorted(t.compute_flops for t in whole)[2]
    kept = design.plan(space(vary=vary, within={"compute_flops": {"high": limit}}))
    assert len(kept) == 3
    with pytest.raises(SpecError, match="none of the 4 points"):
        design.plan(space(vary=vary, within={"compute_flops": {"high": 1}}))


def test_a_trial_is_a_whole_configuration():
    trial = design.make_trial(
        space(vary={"n_total": [1e5], "tokens": [3e4]}, seeds=[7]),
        {"n_total": 1e5, "tokens": 3e4, "training.optimizer.weight_decay": 0.0},
    )
    training = trial.config["training"]
    assert trial.n_total == pytest.approx(1e5, rel=0.16)
    assert training["train_tokens"] == 30_000
    assert training["optimizer"]["weight_decay"] == 0.0
    assert (training["zero_stage"], training["checkpoint_every_steps"]) == (0, 0)
    assert trial.config["model"]["vocab_size"] == 512  # the base wins over the recipe
    assert spec.load_job("pretrain", base=trial.config).plain() == trial.config  # resolved once and for all


def test_an_axis_and_the_base_may_not_decide_the_same():
    base = {**BASE, "training": {"steps": 10}}
    with pytest.raises(SpecError, match=r"tokens and training.steps are both given"):
        design.plan(space(vary={"tokens": [1e4]}, base=base))
    with pytest.raises(SpecError, match=r"at tokens=1e\+04.*unknown key"):
        design.plan(space(vary={"tokens": [1e4], "training.optimizer.momentum": [0.9]}))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"vary": {}}, "nothing varies"),
        ({"vary": {"tokens": [1]}, "early_stopping": {}}, "is for aim: search"),
        (
            {"vary": {"tokens": {"low": 1, "high": 2}}, "design": "optuna", "points": 3},
            "design: optuna is for aim",
        ),
        ({"vary": {"tokens": {"low": 1, "high": 2}}}, "needs the count of levels of tokens"),
        ({"vary": {"tokens": {"low": 1, "high": 2}}, "design": "sobol"}, "sobol needs points"),
        ({"vary": {"tokens": [1]}, "points": 4}, "grid takes no points"),
        ({"vary": {"tokens": {"low": 3, "high": 2}}}, "is not below"),
        ({"vary": {"tokens": [1]}, "design": "isoflop"}, "varies compute_flops and one of"),
        ({"vary": {"tokens": [1]}, "within": {"loss": {"high": 1}}}, "cannot bound loss"),
        ({"vry": {"tokens": [1]}}, "unknown key vry"),
        ({"vary": {"n_total": [1e5]}, "branch": "tokens"}, "design: grid, with tokens in vary"),
        ({"vary": {"tokens": [1]}, "branch": "tokens", "aim": "search"}, "branch: tokens is for aim: law"),
        (
            {"vary": {"tokens": [1], "compute_flops": [1e9]}, "branch": "tokens"},
            "compute_flops do not go together",
        ),
    ],
)
def test_a_space_that_contradicts_itself_says_so(keys, said):
    with pytest.raises(SpecError, match=said):
        space(**keys)


def test_the_named_spaces_are_plans():
    assert {"smoke", "chinchilla", "isoflop", "context", "learning_rate"} <= set(names())
    sizes = {name: design.plan(load_space(name)[1]) for name in names()}
    assert 12 <= len(sizes["smoke"]) <= 16
    compute = [t.compute_flops for t in sizes["chinchilla"]]
    assert len(compute) >= 24
    assert max(compute) / min(compute) >= 100
    assert len({t.context_tokens for t in sizes["context"]}) >= 4
    with pytest.raises(NotFoundError, match="no space 'smok'") as missing:
        load_space("smok")
    assert "smoke" in missing.value.hint


def test_a_users_file_and_overrides(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("vary: {tokens: [1e4, 2e4]}\nbase: {model: {vocab_size: 512}}\n")
    name, found = load_space(str(file), ["vary.training.seed=[3]", "base.model.n_layers=2"])
    assert name == "mine"
    assert found.vary == {"tokens": [1e4, 2e4], "training.seed": [3]}
    assert found.base["model"] == {"vocab_size": 512, "n_layers": 2}


def test_concurrency_never_lets_trials_wait_for_each_other():
    def trial(workers: int, cpus: float = 1) -> design.Trial:
        base = {**BASE, "resources": {"workers": workers, "cpus_per_worker": cpus}}
        return design.make_trial(space(vary={"tokens": [1e4]}, base=base), {"tokens": 1e4})

    assert plan.fitting("pretrain", [trial(1)], {"CPU": 4.0}, None) == 4
    assert plan.fitting("pretrain", [trial(1)], {"CPU": 4.0}, 3) == 3
    assert plan.fitting("pretrain", [trial(2)], {"CPU": 4.0}, None) == 1  # 2 x (2 + 0.1) are more than 4
    assert plan.fitting("pretrain", [trial(2)], {"CPU": 4.2}, None) == 2
    assert (
        plan.fitting("pretrain", [trial(1)], {"CPU": 8.0}, None, cores=2) == 2
    )  # logical CPUs compute nothing
    assert plan.fitting("pretrain", [trial(2)], {"CPU": 4.0}, None, cores=1) == 1
    with pytest.raises(SpecError, match=r"needs 4.1 CPUs, and there are 4"):
        plan.fitting("pretrain", [trial(2, 2.0)], {"CPU": 4.0}, None)


# Branches

BRANCHED = {
    "branch": "tokens",
    "vary": {"n_total": [1e5, 2e5], "tokens": [1e5, 2e5, 4e5, 8e5]},
    "base": spec.merge(BASE, {"training": {"optimizer": {"schedule": "wsd", "decay_fraction": 0.25}}}),
}


def test_branches_share_what_the_rule_says_at_their_mean_length():
    found = design.plan(space(**BRANCHED, repeats={"points": 2, "seeds": [1]}))
    by_trunk = [found[:4], found[4:8], *([t] for t in found[8:])]
    assert [[t.values["tokens"] for t in trunk] for trunk in by_trunk[:2]] == [[1e5, 2e5, 4e5, 8e5]] * 2
    for trunk in by_trunk:
        size, seed = trunk[0].values["n_total"], trunk[0].values["training.seed"]
        assert all((t.values["n_total"], t.values["training.seed"]) == (size, seed) for t in trunk)
        mean = design.make_trial(space(**BRANCHED), {"n_total": size, "tokens": (1e5 * 8e5) ** 0.5})
        assert len({repr(design.trunk_config(t.config)) for t in trunk}) == 1
        stated, rule = trunk[0].config["training"], mean.config["training"]
        assert stated["batch_sequences"] == rule["batch_sequences"] or seed
        assert stated["optimizer"]["warmup_steps"] == min(
            500, mean.train_tokens // (rule["batch_sequences"] * 32) // 20
        )
    whole = [t for trunk in by_trunk[:2] for t in trunk]
    share = sum(t.own_flops for t in whole) / sum(t.compute_flops for t in whole)
    assert share == pytest.approx(0.25 + 0.75 * 8 / 15, rel=0.02)  # docs/theory D.8
    assert all(t.shared_tokens < 0.75 * t.train_tokens for t in whole)
    assert [t.shared_tokens for t in found[8:]] == [0] * len(found[8:])  # a repeat's seed has its own trunk


def test_branches_take_what_the_base_states():
    stated = {"training": {"batch_sequences": 16, "optimizer": {"learning_rate": 0.005, "warmup_steps": 7}}}
    found = design.plan(space(**{**BRANCHED, "base": spec.merge(BRANCHED["base"], stated)}))
    for training in (t.config["training"] for t in found):
        assert training["batch_sequences"] == 16
        assert (training["optimizer"]["learning_rate"], training["optimizer"]["warmup_steps"]) == (0.005, 7)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"training": {"optimizer": {"schedule": "cosine"}}}, "only runs under wsd"),
        ({"training": {"optimizer": {"decay_fraction": 1.0, "warmup_steps": 0}}}, "nothing to share"),
        ({"training": {"optimizer": {"warmup_steps": 10**6}}}, "leave no decay"),
        ({"model": {"moe": {"experts": 4, "estimator": "gumbel"}}}, "annealed temperature"),
    ],
)
def test_what_cannot_branch_is_refused(section: dict, says: str):
    with pytest.raises(SpecError, match=says):
        design.plan(space(**{**BRANCHED, "base": spec.merge(BRANCHED["base"], section)}))


def test_branches_of_a_trunk_run_one_after_another_and_its_checkpoint_goes_with_the_last(tmp_path: Path):
    found = design.plan(space(**BRANCHED))
    made = [identify(n, t, {"corpus": "c"}) for n, t in enumerate(found, 1)]
    assert trials.by_trunk(made[1:]) == [[2, 3, 4], [5, 6, 7, 8]]
    JobFiles(tmp_path, "j").directory.mkdir(parents=True)
    trials.write_planned(tmp_path, "j", made)
    assert trials.read_planned(tmp_path, "j") == made
    files = TrunkFiles(tmp_path, str(made[0].trunk))
    files.checkpoints.mkdir(parents=True)
    for one in made[:4]:
        trials.end_trunk(tmp_path, "j", made[0].trunk)
        assert files.checkpoints.exists()
        end(tmp_path, one, "succeeded", 4.0)
    trials.end_trunk(tmp_path, "j", made[0].trunk)
    assert not files.checkpoints.exists()
    speed = 1e9
    longest = max(sum(t.own_flops for t in found[:4]), sum(t.own_flops for t in found[4:])) / speed
    assert plan.seconds(found, speed, 8) == pytest.approx(longest)


def test_a_law_of_branches_is_resampled_by_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = list[str | None]()
    monkeypatch.setattr(
        launch, "_put_together", lambda settings, names: (pd.DataFrame({"trunk": ["a"]}), [], {}, [])
    )
    monkeypatch.setattr(
        "escala.laws.queries.preview_points", lambda points, group, **rest: asked.append(group)
    )
    launch.preview_sweeps(Settings(), ["s"])
    launch.preview_sweeps(Settings(), ["s"], group="n_total")
    assert asked == ["trunk", "n_total"]


# Points


def planned(home: Path, tokens: int, seed: int = 0, number: int = 1) -> PlannedTrial:
    base = design.make_trial(space(vary={"tokens": [1]}), {"tokens": tokens})
    trial = design.with_seed(base, seed)
    return PlannedTrial(number, trials.trial_fingerprint(trial.config, {"corpus": "c"}), trial)


def end(home: Path, one: PlannedTrial, kind: str, loss: float | None, tokens: int | None = None) -> None:
    """What a trial's attempt leaves."""
    attempt = TrialFiles(home, one.fingerprint).attempt(1)
    attempt.directory.mkdir(parents=True)
    record = RunRecord(
        run_id=None,
        job_id="j",
        attempt=1,
        name="",
        workload="pretrain",
        status=kind,
        started_at=0.0,
        held_out_loss_nats=loss,
        n_total=one.trial.n_total,
        n_active=one.trial.n_active,
        train_tokens=one.trial.train_tokens if tokens is None else tokens,
        compute_flops=one.trial.compute_flops,
    )
    write_json(attempt.outcome, Outcome(kind, "why", record=asdict(record)))


def test_what_is_no_point_keeps_its_reason(tmp_path: Path):
    made = [planned(tmp_path, 20_000 * n, number=n) for n in range(1, 7)]
    JobFiles(tmp_path, "j").directory.mkdir(parents=True)
    trials.write_planned(tmp_path, "j", made)
    end(tmp_path, made[0], "succeeded", 5.0)
    end(tmp_path, made[1], "diverged", None)
    end(tmp_path, made[2], "succeeded", 4.0, tokens=10)
    end(tmp_path, made[3], "succeeded", None)
    TrialFiles(tmp_path, made[4].fingerprint).attempt(1).directory.mkdir(parents=True)
    found = read_points(tmp_path, "j")
    assert found.points["loss_nats"].tolist() == [5.0]
    reasons = found.refused["reason"].tolist()
    assert reasons[0] == "diverged: why"
    assert reasons[1].startswith("unfinished: 10 of 6")
    assert reasons[2:] == ["it has no held-out loss", "unfinished: it has no outcome", "not started"]
    assert found.configuration["model"]["vocab_size"] == 512
    assert "train_tokens" in found.configuration["training"]  # one point: everything is in common


def test_a_point_of_a_mixture_has_its_capacity_factor(tmp_path: Path):
    JobFiles(tmp_path, "j").directory.mkdir(parents=True)
    asked = space(vary={"model.moe.capacity_factor": [0.5, 1.5], "tokens": [20_000]})
    made = [PlannedTrial(i, str(i), trial) for i, trial in enumerate(design.plan(asked))]
    trials.write_planned(tmp_path, "j", made)
    for one in made:
        end(tmp_path, one, "succeeded", 5.0)
    points = read_points(tmp_path, "j").points
    assert sorted(points["capacity_factor"]) == [0.5, 1.5]
    assert (points["n_total"] > 2 * points["n_active"]).all()


def test_a_point_has_its_kind_of_attention_and_two_kinds_are_no_law(tmp_path: Path):
    JobFiles(tmp_path, "j").directory.mkdir(parents=True)
    asked = space(vary={"model.attention": ["exact", "hybrid"], "tokens": [20_000 * n for n in range(1, 9)]})
    made = [PlannedTrial(i, str(i), trial) for i, trial in enumerate(design.plan(asked))]
    trials.write_planned(tmp_path, "j", made)
    for one in made:
        end(tmp_path, one, "succeeded", 2 + 3e2 * one.trial.train_tokens**-0.5)
    found = read_points(tmp_path, "j")
    assert set(found.points["attention"]) == {"exact", "hybrid (window 256, 256 positive features)"}
    assert "attention" not in found.configuration["model"]
    with pytest.raises(LawError, match="2 kinds of attention"):
        fit_law(found.points, "c", bootstrap=0)
    law = fit_law(found.points[found.points["attention"] == "exact"], "c", bootstrap=0)
    assert _provenance(law, "me", [], None)["attention"] == "exact"


def test_seeds_give_the_noise_and_a_law_keeps_the_refused(tmp_path: Path):
    JobFiles(tmp_path, "j").directory.mkdir(parents=True)
    made = [planned(tmp_path, 20_000 * n, seed, 10 * n + seed) for n in range(1, 9) for seed in (0, 1)]
    trials.write_planned(tmp_path, "j", made)
    for one in made[:-1]:
        truth = 2 + 3e2 * one.trial.train_tokens**-0.5
        end(
            tmp_path,
            one,
            "succeeded",
            truth * math.exp(0.01 * (1 if one.trial.values["training.seed"] else -1)),
        )
    end(tmp_path, made[-1], "out_of_memory", None)
    found = read_points(tmp_path, "j")
    assert found.noise == pytest.approx(0.01 * math.sqrt(2), rel=1e-6)
    law = fit_law(pd.concat([found.points, found.refused]), "c", bootstrap=0)
    assert len(law.points) == 15
    assert law.refused["reason"].tolist() == ["out_of_memory: why"]
    assert "reason" not in law.points


def test_five_hundred_trials_load_in_time(tmp_path: Path):
    import time

    JobFiles(tmp_path, "j").directory.mkdir(parents=True)
    made = [planned(tmp_path, 20_000 + 64 * n, number=n) for n in range(500)]
    trials.write_planned(tmp_path, "j", made)
    for one in made:
        end(tmp_path, one, "succeeded", 4.0)
    began = time.process_time()
    assert len(read_points(tmp_path, "j").points) == 500
    assert time.process_time() - began < 3


# Trials on disk


def sweep_spec(home: Path, **keys: object) -> AttemptSpec:
    directory = JobFiles(home, "j").attempt(1).directory
    directory.mkdir(parents=True, exist_ok=True)
    fixed = {"job_id": "j", "attempt": 1, "name": "s", "workload": "sweep", "entry_point": "", "config": {}}
    where = {
        "directory": str(directory),
        "checkpoints": "",
        "data": "",
        "tracking_uri": "",
        "experiment": "e",
    }
    return AttemptSpec(**fixed, **where, **keys)  # type: ignore[arg-type]


def test_a_fingerprint_is_of_configuration_data_and_code():
    config = {"training": {"seed": 1}}
    same = trials.trial_fingerprint(config, {"corpus": "a"})
    assert same == trials.trial_fingerprint({"training": {"seed": 1}}, {"corpus": "a"})
    assert same != trials.trial_fingerprint({"training": {"seed": 2}}, {"corpus": "a"})
    assert same != trials.trial_fingerprint(config, {"corpus": "b"})


def test_only_what_would_come_out_the_same_is_finished(tmp_path: Path):
    for number, (kind, final) in enumerate(
        [
            ("succeeded", True),
            ("diverged", True),
            ("user", False),
            ("worker_lost", False),
            ("out_of_memory", False),
        ]
    ):
        one = planned(tmp_path, 20_000 + 640 * number)
        files = TrialFiles(tmp_path, one.fingerprint)
        assert trials.finished(files) is None
        end(tmp_path, one, kind, None)
        assert (trials.finished(files) is not None) == final
        spec = trials.new_attempt(files, "pretrain", "law", sweep_spec(tmp_path), one)
        assert spec.attempt == 2
        assert files.attempt(2).current.read_text().strip() == "2"
        assert trials.finished(files) is None  # the last attempt counts


def test_the_monitor_passes_a_stop_on_and_sees_the_budget(tmp_path: Path):
    one, two = planned(tmp_path, 20_000, number=1), planned(tmp_path, 40_000, number=2)
    sweep = sweep_spec(tmp_path, remaining_flops=one.trial.compute_flops * 1.5)
    trials.write_planned(tmp_path, "j", [one, two])
    monitor = Monitor(sweep, tmp_path, [one, two], None)
    running = TrialFiles(tmp_path, two.fingerprint)
    trials.new_attempt(running, "pretrain", "law", sweep, two)
    monitor.look()
    assert not running.attempt(1).control.exists()
    progress = {"step": 1, "total_steps": 2, "train_tokens": 9, "compute_flops": 2 * one.trial.compute_flops}
    rest = {
        "wall_seconds": 1.0,
        "loss_nats": None,
        "tokens_per_second": None,
        "model_flops_utilization": None,
    }
    write_json(running.attempt(1).progress, {**progress, **rest, "updated_at": 0.0})
    wait_for(lambda: monitor.look() or running.attempt(1).control.exists(), 10, "the budget is seen")
    assert read_record(Control, running.attempt(1).control) == Control("budget")
    monitor.close()
    outcome = json.loads(running.attempt(1).outcome.read_text())
    assert outcome["kind"] == "cut_off"
    assert "step 1 of 2" in outcome["message"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vary: {n_total: [1]}\nvary: {tokens: [1]}", "vary is there twice, in lines 1 and 2"),
        ("vary: {tokens: {low: 1, high: .inf, count: 3}}", "tokens.high"),
        ("vary: {n_total: [.inf]}", "n_total"),
        ("vary: {n_total: [yes]}", "n_total is a number above 0"),
        ("cells: [{n_total: true}]", "n_total is a number above 0"),
        ("vary: {n_total: [1e5]}\nseeds: [true]", "seeds.0"),
        ("vary: {n_total: [1e5]}\ndesign: sobol\npoints: 1e30", "points"),
        ("vary: {n_total: [1e5]}\nseeds: [yes]", "seeds.0"),
        ("vary: {n_total: [1e5]}\nseeds: [-1]", "seeds.0"),
        ("vary: {n_total: [1e5]}\nrepeats: {seeds: [-1]}", "repeats.seeds.0"),
        ("vary: {n_total: [1e5], tokens: []}", "tokens is an empty list"),
    ],
)
def test_a_space_is_read_as_strictly_as_a_spec(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SpecError) as caught:
        load_space(str(tmp_path / "s.yaml"))
    assert says in caught.value.message


def test_sweeps_put_together_keep_their_refused_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A trial that was cut off has a loss, and is no point: its row says so in a column that no table of a user has."""
    from escala.sweeps import launch

    JobFiles(tmp_path, "j").directory.mkdir(parents=True)
    made = [planned(tmp_path, 20_000 * n, 0, n) for n in range(1, 11)]
    trials.write_planned(tmp_path, "j", made)
    for one in made[:-1]:
        end(tmp_path, one, "succeeded", 2 + 3e2 * one.trial.train_tokens**-0.5)
    end(tmp_path, made[-1], "cut_off", 9.0)
    monkeypatch.setattr(launch, "sweep_points", lambda *_: read_points(tmp_path, "j"))
    found = launch.preview_sweeps(Settings(), ["one", "two"], form="c", bootstrap=0)
    assert found.law.refusals == [(10, "cut_off: why")]
    assert len(found.law.points) == 9
    assert "reason" not in found.law.points
    assert found.understood["sources"] == ["sweep one", "sweep two"]


@pytest.mark.parametrize(
    ("written", "axes", "says"),
    [
        ({}, {"compute_flops": 1e60}, "no machine has more than 1e\\+32"),
        ({}, {"n_total": 1e30}, "no machine has more than 1e\\+14"),
        ({}, {"n_total": 1e5, "context_tokens": 1e12}, "is no model"),
        ({"model": 5}, {"compute_flops": 1e15}, "model is no section"),
        ({"model": {"vocab_size": "yes"}}, {"compute_flops": 1e15}, "is no model"),
        ({"training": {"context_tokens": "yes"}}, {"compute_flops": 1e15}, "context_tokens"),
    ],
)
def test_a_recipe_refuses_what_makes_no_model(written: dict, axes: dict, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        by_recipe(written, axes)


def test_a_dry_run_checks_the_job_s_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCALA_HOME", str(tmp_path))
    for options, says in (({"name": "a b"}, "--name"), ({"max_flops": float("inf")}, "--max-flops")):
        with pytest.raises(SpecError, match=says):
            plan_sweep(Settings(), "smoke", options=options)


def test_a_space_of_too_many_trials_is_refused_before_they_are_made(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("vary: {n_total: {low: 1e5, high: 1e7, count: 1e5}, tokens: [1e6]}")
    with pytest.raises(SpecError, match="100,000 trials"):
        load_space(str(tmp_path / "s.yaml"))
