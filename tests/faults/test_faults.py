"""Real kills, by pid, of all that a job stands on. Nothing is lost or doubled; the loss is the undisturbed run's."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from escala import Escala
from escala.cluster import connection
from escala.contract.records import (
    AttemptFiles,
    AttemptSpec,
    Outcome,
    Progress,
    load_record,
    read_record,
    write_json,
)
from escala.processes import Processes
from escala.runtime_env import job_variables
from escala.settings import Settings
from escala.tracking.mlflow_tracker import open_client
from escala.views.jobs import AttemptView, JobDetailsView
from tests import twin
from tests.conftest import wait_for
from tests.faults.victims import at_step, checkpointed, driver, ended, files, sleeping_driver, titled

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

SAME = ("train_loss_nats", "held_out_loss_nats", "initial_held_out_loss_nats", "train_tokens")


def kill(name: str) -> psutil.Process:
    """Kill one process of the cluster, at once."""
    victim = Processes(Settings().home).alive(name)
    assert victim is not None, f"{name} does not run"
    victim.kill()
    return victim


def running(name: str) -> int | None:
    """The pid of one process of the cluster, where it answers."""
    return next((p.pid for p in Escala().status().processes if p.name == name and p.state == "running"), None)


def comes_back(victim: psutil.Process, name: str) -> None:
    """Wait until another one answers, without any command."""
    wait_for(
        lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, 10, f"the end of {name}"
    )
    limit = 60 if name == "mlflow" else 30
    assert wait_for(lambda: running(name), limit, f"another {name}") != victim.pid


def statuses(job_id: str) -> list[str]:
    """Of the job's runs, in MLflow's words."""
    client = open_client(Settings().tracker)
    return [client.get_run(run).info.status for run in Escala().job(job_id).runs]


def is_as(attempt: AttemptView, undisturbed: JobDetailsView) -> None:
    """The attempt's record says of the whole run what the undisturbed one's does, to the last bit."""
    (whole,) = undisturbed.attempts
    assert {key: attempt.record[key] for key in SAME} == {key: whole.record[key] for key in SAME}


def test_killed_in_every_part_it_ends_as_if_undisturbed(undisturbed: JobDetailsView, tmp_path: Path) -> None:
    """One job: a fault in each attempt, and beside it the death of a process of the cluster, alone of its kind."""
    job_id = twin.submit("killed", retries=3)
    checkpointed(job_id, 1)
    loop = kill("runner")
    titled("RayTrainWorker")[0].kill()
    comes_back(loop, "runner")

    checkpointed(job_id, 2)
    tracker = kill("mlflow")
    driver(job_id).kill()
    comes_back(tracker, "mlflow")

    sleeping = sleeping_driver(
        tmp_path / "driver"
    )  # while the attempt starts: its steps do not wait for this one
    at_step(job_id, 1, attempt=3)
    before = Processes(Settings().home).marked("ray")
    assert {driver(job_id), sleeping} <= set(before)
    assert len([process for process in titled("RayTrainWorker") if process in before]) == 2
    checkpointed(job_id, 3)
    watchdog = kill("watchdog")
    head = kill("ray")
    comes_back(watchdog, "watchdog")

    checkpointed(job_id, 4)
    loop = kill("runner")
    driver(job_id).terminate()
    comes_back(loop, "runner")
    assert running("ray") not in (None, head.pid)
    assert [p for p in before if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []  # no orphan

    details = ended(job_id)
    assert details.job.state == "succeeded", details.job.message
    lost, (preempted, last) = details.attempts[:3], details.attempts[3:]
    assert [a.outcome for a in details.attempts] == [
        "worker_lost",
        "driver_lost",
        "driver_lost",
        "preempted",
        "succeeded",
    ]
    assert details.job.retries_used == len(lost)  # a preemption costs none
    is_as(last, undisturbed)
    assert last.record["train_tokens"] == twin.STEPS * twin.BATCH * twin.CONTEXT
    assert last.record["attempt_tokens"] < last.record["train_tokens"]  # it went on from a checkpoint
    assert details.totals.train_tokens >= last.record["train_tokens"]

    # The preempted one has checkpointed first: not one step is repeated.
    assert preempted.checkpoint is not None
    assert last.record["train_tokens"] - last.record["attempt_tokens"] == preempted.record["train_tokens"]

    lines = list(Escala().logs(job_id))  # they outlive the head
    assert any("step 0" in line and "held_out" in line for line in lines)
    assert sum("resumed from" in line for line in lines) == 4

    assert twin.delivered_losses(job_id) == twin.delivered_losses(undisturbed.job.id)
    assert statuses(job_id) == ["FAILED", "FAILED", "FAILED", "KILLED", "FINISHED"]


@pytest.mark.nightly(minutes=1)
def test_a_killed_tracker_and_reconcile_loop_come_back_and_lose_and_double_nothing(
    undisturbed: JobDetailsView,
) -> None:
    """Each alone, inside one attempt."""
    job_id = twin.submit("tracker-and-loop-killed")
    at_step(job_id, 1)
    for name in ("runner", "mlflow", "watchdog", "runner"):
        comes_back(kill(name), name)
    details = ended(job_id)
    assert [a.outcome for a in details.attempts] == ["succeeded"]
    is_as(details.attempts[0], undisturbed)
    assert twin.delivered_losses(job_id) == twin.delivered_losses(undisturbed.job.id)
    assert statuses(job_id) == ["FINISHED"]


@pytest.mark.nightly(minutes=1)
def test_a_preempted_driver_ends_cleanly(undisturbed: JobDetailsView, tmp_path: Path) -> None:
    """Started by hand: Ray keeps no exit status of a driver whose successor is there."""
    given = load_record(AttemptSpec, files(undisturbed.job.id).spec)
    found = AttemptFiles(tmp_path / "1")
    found.directory.mkdir()
    spec = replace(
        given,
        directory=str(found.directory),
        checkpoints=str(tmp_path / "checkpoints"),
        tracking_uri=f"spool:{found.spool}",
        tags={},
    )
    write_json(found.spec, spec)
    command = [sys.executable, "-m", spec.entry_point, str(found.spec)]
    environment = os.environ | job_variables(Settings().gcs_address) | connection(Settings()).environment
    with subprocess.Popen(command, env=environment) as process:

        def trains() -> bool:
            assert process.poll() is None
            progress = read_record(Progress, found.progress)
            return progress is not None and progress.step >= 1

        wait_for(trains, 240, "its first step")
        process.terminate()
    assert process.returncode == 0
    outcome = load_record(Outcome, found.outcome)
    assert (outcome.kind, outcome.checkpoint is None) == ("preempted", False)
    assert outcome.record is not None
    assert outcome.record["energy_joules"] is None  # it was told of no cluster's coefficients
