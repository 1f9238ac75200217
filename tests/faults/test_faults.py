"""Real kills, by pid, of all that a job stands on. Nothing is lost or doubled; the loss is the undisturbed run's."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from escala import Escala
from escala.settings import Settings
from escala.tracking.queries import list_runs
from escala.views.jobs import JobDetailsView
from tests.conftest import wait_for
from tests.faults.victims import at_step, driver, ended, titled

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 300
OVERRIDES = [
    "model={vocab_size: 512, n_layers: 2, d_model: 64, n_heads: 2, max_context_tokens: 64}",
    "data={tokenizer: {vocab_size: 512, train_characters: 300000}, max_characters: 2000000, held_out_fraction: 0.2}",
    f"training={{steps: {STEPS}, batch_sequences: 8, evaluation_tokens: 4096, checkpoint_every_steps: 50}}",
    "resources.workers=1",  # two workers, killed and resumed: tests/integration/test_pretrain.py
]


def submit(name: str, *more: str) -> str:
    return Escala().submit("pretrain", (), [*OVERRIDES, *more], {"name": name}).id


def final(details: JobDetailsView) -> tuple[float, float]:
    """Held-out loss and training loss of the last step, as recorded."""
    assert details.job.state == "succeeded", details.job.message
    record = details.attempts[-1].record
    return record["held_out_loss_nats"], record["train_loss_nats"]


@pytest.fixture(scope="module")
def undisturbed(cluster: Path) -> tuple[float, float]:
    """What the run ends with when nobody disturbs it."""
    return final(ended(submit("undisturbed")))


@pytest.mark.parametrize("what", ["worker", "driver"])
def test_a_killed_process_is_a_new_attempt_with_the_same_loss(
    undisturbed: tuple[float, float], what: str
) -> None:
    job_id = submit(f"{what}-killed")
    at_step(job_id, 60)
    victim = driver(job_id) if what == "driver" else titled("RayTrainWorker")[0]
    victim.kill()
    details = ended(job_id)
    assert [a.outcome for a in details.attempts] == [f"{what}_lost", "succeeded"]
    assert final(details) == undisturbed
    last = details.attempts[-1].record
    assert last["train_tokens"] == STEPS * 8 * 64
    assert last["attempt_tokens"] < last["train_tokens"]  # it went on from a checkpoint
    assert details.totals.train_tokens >= last["train_tokens"]


def test_a_killed_head_is_restarted_and_its_jobs_go_on(undisturbed: tuple[float, float]) -> None:
    job_id = submit("head-killed")
    at_step(job_id, 60)
    before = next(p.pid for p in Escala().status().processes if p.name == "ray")
    psutil.Process(before).kill()
    details = ended(job_id)
    assert [a.outcome for a in details.attempts] == ["driver_lost", "succeeded"]
    assert final(details) == undisturbed
    assert next(p.pid for p in Escala().status().processes if p.name == "ray") != before
    assert any(
        "step 0" in line or "held-out" in line for line in Escala().logs(job_id)
    )  # logs outlive the head


def kill_and_await(name: str) -> None:
    """Kill one process of the cluster, and wait until another one answers, without any command."""
    (before,) = (p.pid for p in Escala().status().processes if p.name == name)
    victim = psutil.Process(before)
    victim.kill()
    wait_for(
        lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, 10, f"the end of {name}"
    )
    back = wait_for(
        lambda: next(
            (p.pid for p in Escala().status().processes if p.name == name and p.state == "running"), None
        ),
        60 if name == "mlflow" else 30,
        f"another {name}",
    )
    assert back != before


def test_a_killed_tracker_and_reconcile_loop_come_back_and_lose_and_double_nothing(
    undisturbed: tuple[float, float],
) -> None:
    job_id = submit("tracker-and-loop-killed")
    at_step(job_id, 30)
    for name in ("runner", "mlflow", "watchdog", "runner"):  # each alone, inside training
        kill_and_await(name)
    details = ended(job_id)
    assert [a.outcome for a in details.attempts] == ["succeeded"]
    assert final(details) == undisturbed
    settings = Settings()

    def delivered() -> bool:
        found = list_runs(settings.tracker, settings.experiment, job_id=job_id)
        assert len(found) <= 1, "a run was doubled"
        return (
            bool(found) and MlflowClient(settings.tracker).get_run(found[0].run_id).info.status == "FINISHED"
        )

    wait_for(delivered, 120, "the run in MLflow, closed: all else is there by then", every=1.0)
    assert len(_training_losses(job_id)) == STEPS


def _training_losses(job_id: str) -> list[float]:
    settings = Settings()
    run = list_runs(settings.tracker, settings.experiment, job_id=job_id)[0]
    return [m.value for m in MlflowClient(settings.tracker).get_metric_history(run.run_id, "train_loss_nats")]


def test_a_sigterm_to_the_driver_checkpoints_first_and_costs_no_retry(
    undisturbed: tuple[float, float],
) -> None:
    job_id = submit("preempted")
    at_step(job_id, 60)
    driver(job_id).terminate()
    details = ended(job_id)
    assert [a.outcome for a in details.attempts] == ["preempted", "succeeded"]
    assert details.job.retries_used == 0
    assert final(details) == undisturbed
    first, second = (a.record for a in details.attempts)
    assert first["attempt_tokens"] + second["attempt_tokens"] == STEPS * 8 * 64  # not one step repeated
