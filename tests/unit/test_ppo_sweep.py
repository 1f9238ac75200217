"""A sweep of PPO: planned, judged by its reward, kept out of laws."""

from __future__ import annotations

from typing import Any

import pytest

from escala import spec
from escala.contract.errors import LawError, SpecError
from escala.contract.records import Outcome, TrialFiles, write_json
from escala.schema.workloads import WORKLOADS, objective_of
from escala.settings import Settings
from escala.sweeps import launch, plan
from escala.sweeps.design import Trial
from escala.sweeps.points import read_points
from escala.sweeps.space import Space, load_space
from escala.sweeps.trials import PlannedTrial, write_planned


def space(**changes: Any) -> Space:
    _, found = load_space("ppo")
    return spec.validate(Space, spec.merge(found.model_dump(mode="json"), changes), "space")


def test_the_shipped_space_is_planned_with_its_service() -> None:
    found = plan.make_plan(*load_space("ppo"), Settings())
    assert len(found.trials) == 9
    rates = {t.config["training"]["optimizer"]["learning_rate"] for t in found.trials}
    coefficients = {t.config["kl"]["coefficient"] for t in found.trials}
    assert (rates, coefficients) == ({3e-6, 1e-5, 3e-5}, {0.01, 0.05, 0.2})
    assert found.compute_flops > 0
    assert WORKLOADS["ppo"].sidecar_needs(found.trials[0].config) == {
        "CPU": 1.0,
        "GPU": 0.0,
    }  # a policy and a reward replica of half each
    trial: Trial = found.trials[0]
    assert plan.fitting("ppo", [trial], {"CPU": 4.5}, None) == 2
    with pytest.raises(SpecError, match="largest trial needs"):
        plan.fitting("ppo", [trial], {"CPU": 1.5}, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vary": {"n_total": [1e5, 2e5]}}, "starts from one"),
        ({"aim": "law"}, "no law"),
        ({"early_stopping": {"grace": 1}}, "judged by its end"),
    ],
)
def test_what_is_for_pretraining_alone_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        space(**changes)


def test_a_trial_is_judged_by_its_reward_and_gives_a_row_but_no_law(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plan.make_plan(*load_space("ppo"), Settings())
    planned = [PlannedTrial(n, f"trial{n}", trial) for n, trial in enumerate(found.trials[:3], 1)]
    (tmp_path / "jobs" / "s").mkdir(parents=True)
    write_planned(tmp_path, "s", planned)
    record = {
        "workload": "ppo",
        "train_tokens": 17,
        "compute_flops": 1e9,
        "measures": {"reward": 0.5, "kl_nats": 2.0},
    }
    for one, kept in zip(planned, (record, {**record, "measures": {}}), strict=False):
        attempt = TrialFiles(tmp_path, one.fingerprint).attempt(1)
        attempt.directory.mkdir(parents=True)
        write_json(attempt.outcome, Outcome("succeeded", record=kept))
    assert objective_of(record).minimised(record) == -0.5
    assert objective_of(record).minimised({**record, "measures": {}}) is None
    trained = {"workload": "pretrain", "held_out_loss_nats": 3.0}
    assert objective_of(trained).minimised(trained) == 3.0
    points = read_points(tmp_path, "s")
    assert points.points[["reward", "kl_nats", "tokens"]].values.tolist() == [[0.5, 2.0, 17]]
    assert points.refused["reason"].tolist() == ["it has no reward", "not started"]
    assert points.noise is None
    monkeypatch.setattr(launch, "sweep_points", lambda _, name: points)
    with pytest.raises(LawError, match="no held-out loss"):
        launch.fit_sweeps(Settings(), ["s"], "law")
