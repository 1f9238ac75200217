"""A run against a law: inside, an alarm with what differs, and the runs that no law can judge."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from escala.contract.records import AttemptFiles, AttemptSpec, Outcome, RunRecord, write_json
from escala.laws import Law, fit_law
from escala.laws.drift import Predictions, calibration, check, compare_run, wilson
from escala.laws.reference import Cache, Stored
from escala.tracking.spool import read_events

TEXT = {"tokenizer_fingerprint": "t", "evaluation_fingerprint": "e"}
COMMON = {"training": {"precision": "fp32", "seed": 0}, "model": {"vocab_size": 1024}}
CONFIG = {"training": {"precision": "fp32", "seed": 3}, "model": {"vocab_size": 1024}}


def truth(n: float, d: float) -> float:
    return 1.8 + 480 * n**-0.35 + 2000 * d**-0.37


@pytest.fixture(scope="module")
def law() -> Law:
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(6, 8, 60), 10 ** rng.uniform(8, 10, 60)
    loss = [truth(a, b) * math.exp(0.005 * rng.standard_normal()) for a, b in zip(n, d, strict=True)]
    return fit_law(pd.DataFrame({"loss_nats": loss, "n_active": n, "n_total": n, "tokens": d}), bootstrap=200)


@pytest.fixture
def stored(law: Law) -> Stored:
    return Stored("small", 2, law, {**TEXT, "run_ids": ["own"], "configuration": COMMON})


def record(factor: float = 1.0, **keys: object) -> RunRecord:
    fixed = {
        "run_id": "r",
        "job_id": "j",
        "attempt": 1,
        "name": "n",
        "workload": "pretrain",
        "started_at": 0.0,
    }
    sizes = {"n_active": 10_000_000, "n_total": 10_000_000, "train_tokens": 10**9, "compute_flops": 6e16}
    loss = {"status": "succeeded", "held_out_loss_nats": truth(1e7, 1e9) * factor}
    return RunRecord(**{**fixed, **sizes, **loss, **TEXT, **keys})  # type: ignore[arg-type]


def test_a_run_as_predicted_is_inside(stored: Stored):
    found = check(stored, asdict(record()), "r", CONFIG, 1.0)
    assert found is not None
    assert found.inside
    assert not found.alarm
    assert found.difference is None
    assert found.alarm_low < found.low < found.predicted < found.high < found.alarm_high
    assert found.law == "small@2"


def test_an_alarm_says_what_differs(stored: Stored):
    config = {**CONFIG, "training": {"precision": "bf16", "seed": 3}}
    found = check(stored, asdict(record(1.2)), "r", config, 1.0)
    assert found is not None
    assert found.alarm
    assert found.error == pytest.approx(0.2, abs=0.02)
    assert found.difference == {"training.precision": ["fp32", "bf16"]}  # the seed is no news
    unknown = replace(stored, provenance={**TEXT, "run_ids": []})
    assert check(unknown, asdict(record(1.2)), "r", config, 1.0).difference is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "keys",
    [
        {"status": "diverged"},
        {"held_out_loss_nats": None},
        {"tokenizer_fingerprint": "another"},
        {"evaluation_fingerprint": None},
        {"n_active": None},
    ],
)
def test_what_no_law_can_judge_is_left_alone(stored: Stored, keys: dict[str, object]):
    assert check(stored, asdict(record(**keys)), "r", CONFIG, 1.0) is None


def test_a_law_does_not_judge_its_own_points_or_text_that_it_does_not_know(stored: Stored, law: Law):
    assert check(stored, asdict(record()), "own", CONFIG, 1.0) is None
    assert check(replace(stored, provenance={}), asdict(record()), "r", CONFIG, 1.0) is None
    plain = replace(law, replicates_BP=law.replicates_BP[:0])
    assert check(replace(stored, law=plain), asdict(record()), "r", CONFIG, 1.0) is None


def attempt(home: Path, run: RunRecord, **tags: str) -> Path:
    """An attempt that has ended and is delivered."""
    files = AttemptFiles(home / "jobs" / "j" / "attempt-1")
    files.spool.mkdir(parents=True, exist_ok=True)
    (files.spool / "run_id").write_text("r")
    texts = dict.fromkeys(("checkpoints", "data", "tracking_uri", "experiment", "entry_point", "name"), "")
    spec = AttemptSpec(
        "j", 1, workload="pretrain", config=CONFIG, directory=str(files.directory), tags=tags, **texts
    )
    write_json(files.spec, spec)
    write_json(files.outcome, Outcome(run.status, record=asdict(run)))
    return files.directory


def test_a_run_is_compared_once_with_each_champion(tmp_path: Path, stored: Stored):
    cache = Cache(tmp_path, "tracker")
    cache.put(stored)
    directory = attempt(tmp_path, record(1.3))
    assert not compare_run(tmp_path, "tracker", directory)  # it is nobody's champion yet
    cache.set_champion("small", 2)
    assert compare_run(tmp_path, "tracker", directory)
    assert not compare_run(tmp_path, "tracker", directory)  # after a restart of the runner
    assert not compare_run(tmp_path, "another tracker", directory)
    assert [c.law for c in Predictions(tmp_path).read()] == ["small@2"]
    (tags,) = (e["tags"] for e in read_events(AttemptFiles(directory).spool) if e["event"] == "tags")
    assert tags["escala.law.small"].startswith("ALARM: small@2 predicted")
    assert tags["escala.law.small"].endswith("configuration: as in all of its runs")


def test_a_searchs_trials_are_no_evidence(tmp_path: Path, stored: Stored):
    cache = Cache(tmp_path, "tracker")
    cache.put(stored)
    cache.set_champion("small", 2)
    assert not compare_run(tmp_path, "tracker", attempt(tmp_path, record(1.3), **{"escala.aim": "search"}))


def test_calibration_counts(stored: Stored):
    checks = [check(stored, asdict(record(f)), str(f), CONFIG, 1.0) for f in (1.0, 1.001, 0.999, 1.3)]
    found = calibration([c for c in checks if c is not None])
    assert found.coverage == 0.75
    assert found.alarms == 1
    assert found.expected_alarms == pytest.approx(0.04)
    assert found.coverage_low == pytest.approx(0.3006, abs=1e-4)  # Wilson's interval of 3 in 4
    assert found.coverage_high == pytest.approx(0.9544, abs=1e-4)
    assert calibration([]).coverage is None
    assert wilson(0, 10)[0] == 0.0
