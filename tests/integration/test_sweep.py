"""Sweeps on the session's cluster: points, reuse, a killed driver, trials that fail, a search, two workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from escala import Escala
from escala.contract.errors import SpecError, StateError
from escala.contract.records import JobFiles, TrialFiles
from escala.settings import Settings
from escala.sweeps.trials import read_planned
from tests.conftest import wait_for
from tests.faults.victims import ended
from tests.integration.sweeps import BASE, SEEDS, VARY, Killed, attempts, kill_on_its_way, losses, write

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


TRIALS = len(SEEDS) * len(VARY["tokens"])


@pytest.fixture(scope="module")
def killed_sweep(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return kill_on_its_way(tmp_path_factory.mktemp("space"))


def test_a_killed_sweep_ends_with_the_same_points_and_repeats_none(killed_sweep: Killed) -> None:
    space, job, details = killed_sweep.space, killed_sweep.job, killed_sweep.details
    home = Settings().home
    assert details.job.state == "succeeded", details.job.message
    assert [a.outcome for a in details.attempts] == ["driver_lost", "succeeded"]
    once = losses(job)
    assert len(once) == TRIALS
    before = killed_sweep.before
    assert all(len(TrialFiles(home, each).attempts()) == 1 for each in before), f"killed after {len(before)}"
    assert max(attempts(job)) == 2  # what had not finished was trained again
    points = Escala().sweep_points(job).points
    assert len({point["trunk"] for point in points}) == len(SEEDS)
    assert not list((home / "trials").glob("trunk-*/checkpoints"))  # they go with their last branch

    # In MLflow: a run for each trial's attempt, below the attempt of the sweep that started it.
    Escala().finished_run(job)  # all is in the tracker, the trials' runs too
    parents = Escala().job(job).runs
    runs = [r for r in Escala().runs(job=job) if r.workload == "pretrain"]
    assert len(runs) == sum(attempts(job))
    assert {r.parent_run_id for r in runs} == set(parents)
    # The outcome is written last: a killed trial's run may have ended well before it was, and it was trained again.
    assert 0 <= len([r for r in runs if r.status == "succeeded"]) - TRIALS <= 2  # as many ran at once

    # The same space again trains nothing.
    assert losses(ended(Escala().sweep(space).id).job.id) == once
    assert losses("killed") == once  # a name means its newest sweep
    assert sum(attempts(job)) == len(runs)
    with pytest.raises(StateError, match="is succeeded"):
        Escala().sweep(space, resume=True)


@pytest.mark.nightly(minutes=1)
def test_from_nothing_the_same_space_gives_the_same_points(killed_sweep: Killed) -> None:
    once, trials = losses(killed_sweep.job), Settings().home / "trials"
    trials.rename(trials.with_name("trials-before"))
    again = ended(Escala().sweep(killed_sweep.space).id).job.id
    assert losses(again) == once
    assert attempts(again) == [1] * TRIALS


@pytest.mark.nightly(minutes=1)
def test_a_stopped_sweep_resumes_and_bad_trials_are_refused_with_their_reason(
    cluster: Path, tmp_path: Path
) -> None:
    vary = {"training.optimizer.learning_rate": [3e-3, 1e30], "training.steps": [100, 101, 102]}
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


@pytest.mark.nightly(minutes=1)  # six processes of six trials
def test_a_search_by_optuna_stops_bad_trials_early(cluster: Path, tmp_path: Path) -> None:
    base = {**BASE, "training": {**BASE["training"], "steps": 80, "evaluate_every_steps": 20}}
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


@pytest.mark.nightly(minutes=1)  # two starts of Ray Train
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
