"""Real pretraining on the session's cluster: Ray Train, two workers, ZeRO-3, real text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from escala.contract.records import JobFiles
from escala.planning.cost import communication
from escala.schema import PretrainConfig
from escala.settings import Settings
from escala.storage.checkpoints import list_checkpoints, open_checkpoints
from escala.views.jobs import JobDetailsView
from tests import twin
from tests.faults.victims import ended, files

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def checkpoints(job_id: str) -> list[int]:
    """Their steps."""
    store = open_checkpoints(JobFiles(Settings().home, job_id).checkpoints)
    return [checkpoint.step for checkpoint in list_checkpoints(store)]


@pytest.fixture
def record(undisturbed: JobDetailsView) -> dict[str, Any]:
    (attempt,) = undisturbed.attempts
    assert attempt.record is not None
    return attempt.record


def test_two_workers_train_and_record(undisturbed: JobDetailsView, record: dict[str, Any]) -> None:
    assert record["held_out_loss_nats"] < record["initial_held_out_loss_nats"] - 0.5
    assert record["train_tokens"] == record["attempt_tokens"] == twin.STEPS * twin.BATCH * twin.CONTEXT
    assert record["compute_flops"] > 0
    assert record["workers"] == 2
    assert record["communication_bytes"] == pytest.approx(
        communication(PretrainConfig.model_validate(undisturbed.job.config)).sent_bytes, rel=0.05
    )
    assert record["peak_memory_bytes"] > record["idle_memory_bytes"] > 0
    assert record["energy_joules"] > 0  # by the cluster's coefficients; without: test_old_home.py
    assert 0 < record["model_flops_utilization"] < 1
    for name in ("corpus", "tokenizer", "evaluation", "config", "code"):
        assert len(record[f"{name}_fingerprint"]) == 64
    assert checkpoints(undisturbed.job.id) == [twin.STEPS - twin.EVERY, twin.STEPS]
    (attempt,) = undisturbed.attempts
    assert attempt.checkpoint is not None
    assert attempt.checkpoint.endswith(f"step-{twin.STEPS:08d}")


def test_each_rank_holds_half_of_the_parameters(undisturbed: JobDetailsView, record: dict[str, Any]) -> None:
    held = json.loads(files(undisturbed.job.id).facts.read_text())["parameters_held"]
    total = record["n_total"]
    assert len(held) == 2
    assert all(total / 2 <= share <= total / 2 + 50 for share in held)  # a padded element a parameter


@pytest.mark.nightly(minutes=1)
@pytest.mark.usefixtures("cluster")
def test_divergence_is_named_and_not_checkpointed() -> None:
    wild = "training.optimizer={learning_rate: 1e30, clip_norm: null}"
    details = ended(twin.submit("wild", wild, "training.zero_stage=0", "resources.workers=1"))
    (attempt,) = details.attempts
    assert attempt.outcome == "diverged"
    assert "diverged at step" in attempt.message
    assert checkpoints(details.job.id) == []
