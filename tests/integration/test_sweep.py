"""Sweeps on the session's cluster: points, reuse, a killed driver, trials that fail, a search, two workers."""

from __future__ import annotations

import random
from pathlib import Path

import psutil
import pytest

from escala import Escala
from escala.contract.errors import SpecError, StateError
from escala.contract.records import JobFiles, Progress, TrialFiles, read_record
from escala.documents import dump
from escala.settings import Settings
from escala.sweeps.trials import finished, read_planned
from tests.conftest import wait_for
from tests.integration.test_jobs import ended

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

BASE = {
    "model": {"vocab_size": 512, "n_layers": 2, "d_model": 32, "n_heads": 2, "max_context_tokens": 32},
    "data": {
        "tokenizer": {"vocab_size": 512, "train_characters": 300_000},
        "max_characters": 2_000_000,
        "held_out_fraction": 0.2,
    },
    "training": {"batch_sequences": 8, "evaluation_tokens": 4096, "log_every_steps": 10},
}


def write(directory: Path, name: str, **keys: object) -> str:
    path = directory / f"{name}.yaml"
    path.write_text(dump({"base": BASE, **keys}))
    return str(path)


def losses(job_id: str) -> dict[str, float]:
    points = Escala().sweep_points(job_id).points
    return {point["trial"]: point["loss_nats"] for point in points}


def attempts(job_id: str) -> list[int]:
    home = Settings().home
    return [len(TrialFiles(home, p.fingerprint).attempts()) for p in read_planned(home, job_id)]


def test_a_killed_sweep_ends_with_the_same_points_and_repeats_none(cluster: Path, tmp_path: Path) -> None:
    space = write(tmp_path, "killed", vary={"training.steps": [300, 600, 900]}, seeds=[0, 1])
    home = Settings().home
    job = Escala().sweep(space).id
    moment = random.uniform(0.05, 0.8)  # of the sweep's tokens
    total = Escala().plan_sweep(space).train_tokens

    def reached() -> bool:
        progress = read_record(Progress, JobFiles(home, job).attempt(1).progress)
        return progress is not None and progress.train_tokens >= moment * total

    wait_for(reached, 240, f"{moment:.0%} of the sweep", every=0.05)
    before = [p.fingerprint for p in read_planned(home, job) if finished(TrialFiles(home, p.fingerprint))]
    driver = [
        p
        for p in psutil.process_iter(["cmdline"])
        if f"jobs/{job}/attempt-1" in " ".join(p.info["cmdline"] or [])
    ]
    for process in driver:
        process.kill()
    details = ended(job)
    assert details.job.state == "succeeded", details.job.message
    assert [a.outcome for a in details.attempts] == ["driver_lost", "succeeded"]
    once = losses(job)
    assert len(once) == 6
    assert all(len(TrialFiles(home, each).attempts()) == 1 for each in before), f"killed at {moment:.0%}"
    assert max(attempts(job)) == 2  # what had not finished was trained again

    # In MLflow: a run for each trial's attempt, below the attempt of the sweep that started it.
    Escala().finished_run(job)  # all is in the tracker, the trials' runs too
    parents = Escala().job(job).runs
    runs = [r for r in Escala().runs(job=job) if r.workload == "pretrain"]
    assert len(runs) == sum(attempts(job))
    assert {r.parent_run_id for r in runs} == set(parents)
    assert len([r for r in runs if r.status == "succeeded"]) == 6

    # The same space again trains nothing; from nothing, it gives the same points.
    assert losses(ended(Escala().sweep(space).id).job.id) == once
    assert sum(attempts(job)) == len(runs)
    with pytest.raises(StateError, match="is succeeded"):
        Escala().sweep(space, resume=True)
    (home / "trials").rename(home / "trials-before")
    assert losses(ended(Escala().sweep(space).id).job.id) == once
    assert losses("killed") == once  # a name means its newest sweep


def test_a_stopped_sweep_resumes_and_bad_trials_are_refused_with_their_reason(
    cluster: Path, tmp_path: Path
) -> None:
    vary = {"training.optimizer.learning_rate": [3e-3, 1e30], "training.steps": [400, 401, 402]}
    space = write(tmp_path, "stopped", vary=vary, concurrency=1)
    job = Escala().sweep(space).id
    wait_for(
        lambda: any(attempts(job)) if read_planned(Settings().home, job) else False, 120, "the first trial"
    )
    Escala().stop(job)
    stopped = ended(job)
    assert (stopped.job.state, stopped.job.reason) == ("stopped", "user")
    assert len(Escala().sweep_points(job).refused) > 3
    with pytest.raises(SpecError, match="is not what it was"):
        Escala().sweep(space, ["seeds=[5]"], resume=True)
    assert Escala().sweep(space, resume=True).id == job
    assert ended(job).job.state == "succeeded"
    found = Escala().sweep_points(job)
    assert len(found.points) == 3
    assert [row["reason"].startswith("diverged: training diverged at step") for row in found.refused] == [
        True
    ] * 3


def test_a_search_by_optuna_stops_bad_trials_early(cluster: Path, tmp_path: Path) -> None:
    base = {**BASE, "training": {**BASE["training"], "steps": 200, "evaluate_every_steps": 20}}
    vary = {"training.optimizer.learning_rate": {"low": 1e-6, "high": 1e-2}}
    keys = {
        "aim": "search",
        "design": "optuna",
        "points": 6,
        "early_stopping": {"reduction": 2},
        "base": base,
    }
    details = ended(Escala().sweep(write(tmp_path, "search", vary=vary, **keys)).id)
    assert details.job.state == "succeeded", details.job.message
    found = Escala().sweep_points(details.job.id)
    assert len(found.points) + len(found.refused) == 6
    assert len(found.points) >= 1
    assert any(row["reason"].startswith("cut_off: ended by the sweep's scheduler") for row in found.refused)


def test_trials_of_two_workers_run_one_after_another(cluster: Path, tmp_path: Path) -> None:
    base = {**BASE, "resources": {"workers": 2}}
    space = write(tmp_path, "two", vary={"training.steps": [20, 30]}, base=base, concurrency=1)
    assert Escala().plan_sweep(space).concurrency == 1
    with pytest.raises(SpecError, match="the largest trial needs"):
        Escala().plan_sweep(space, ["base.resources.workers=8"])
    details = ended(Escala().sweep(space).id)
    assert details.job.state == "succeeded", details.job.message
    assert len(Escala().sweep_points(details.job.id).points) == 2
    assert not JobFiles(Settings().home, details.job.id).checkpoints.exists()
