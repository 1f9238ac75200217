"""A job's life on the session's cluster: budget, dependency, resume on more workers, runs, retention."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from escala import Escala
from escala.contract.errors import SpecError
from escala.contract.records import JobFiles, Progress, read_record
from tests import twin
from tests.conftest import wait_for
from tests.faults.victims import ended

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]

STEPS, BATCH, CONTEXT = 60, 8, twin.CONTEXT
OVERRIDES = [
    twin.MODEL,
    twin.DATA,
    f"training={{steps: {STEPS}, batch_sequences: {BATCH}, evaluation_tokens: 4096, checkpoint_every_steps: 10}}",
]


@pytest.mark.nightly(minutes=1)
def test_a_budget_stops_a_job_and_resume_finishes_it_on_two_workers(cluster: Path) -> None:
    flops = Escala().resolve("pretrain", (), OVERRIDES).cost.compute_flops
    half = Escala().submit("pretrain", (), OVERRIDES, {"name": "half", "max_flops": flops / 2}).id
    waiting = Escala().submit("pretrain", (), OVERRIDES, {"name": "waiting", "after": half}).id

    first = ended(half)
    assert (first.job.state, first.job.reason) == ("stopped", "budget")
    assert first.totals.train_tokens == STEPS // 2 * BATCH * CONTEXT
    assert first.totals.compute_flops <= flops / 2
    refused = ended(waiting)
    assert (refused.job.state, refused.job.reason, refused.job.attempts) == ("failed", "dependency", 0)
    with pytest.raises(SpecError, match="did you mean steps"):
        Escala().resume(half, ["training.step=60"])

    second = ended(Escala().resume(half, ["resources.workers=2"]).id)
    assert second.job.state == "succeeded", second.job.message
    record = Escala().finished_run(second.job.id)
    assert record.train_tokens == STEPS * BATCH * CONTEXT
    assert record.attempt_tokens == STEPS // 2 * BATCH * CONTEXT  # the first half was not repeated
    assert record.workers == 2
    assert record.held_out_loss_nats < Escala().finished_run(half).held_out_loss_nats
    assert len({record.evaluation_fingerprint, Escala().finished_run(half).evaluation_fingerprint}) == 1
    assert "held_out_loss_nats" in Escala().compare([half, second.job.id])

    spare = Escala().collect_garbage(half, keep=1)
    assert len(spare.checkpoints) == 1  # two were kept by the job's own rule
    Escala().collect_garbage(half, keep=1, delete=True)
    assert Escala().collect_garbage(half, keep=1).checkpoints == ()


STOPPED_SECONDS = 5.0


def stop_while_it_starts(job_id: str, home: Path) -> float:
    """Stop a job whose run is open and that has not made a step; seconds until it is stopped."""
    files = JobFiles(home, job_id).attempt(1)
    wait_for(lambda: any(files.spool.glob("events-*")), 120, f"the driver of {job_id} is there", every=0.05)
    progress = read_record(Progress, files.progress)
    assert progress is None or progress.train_tokens == 0
    began = time.monotonic()
    Escala().stop(job_id)
    wait_for(lambda: Escala().job(job_id).job.state == "stopped", 60, f"{job_id} is stopped", every=0.05)
    return time.monotonic() - began


def test_a_job_that_starts_is_stopped_at_once_and_killed_in_the_tracker(
    cluster: Path, tmp_path: Path
) -> None:
    """Ray Train's start, a sweep's, and one whose driver is not even there."""
    space = tmp_path / "space.yaml"
    base = yaml.safe_load("{" + ", ".join(each.replace("=", ": ", 1) for each in OVERRIDES) + "}")
    space.write_text(yaml.safe_dump({"base": base, "vary": {"training.steps": [50, 60]}}))
    seconds = {}
    for what, submit in {
        "train": lambda: Escala().submit("pretrain", (), [*OVERRIDES, "resources.workers=2"]),
        "sweep": lambda: Escala().sweep(str(space)),
    }.items():
        job = submit().id
        seconds[what] = stop_while_it_starts(job, cluster)
        details = Escala().job(job)
        assert (details.job.reason, details.job.message) == ("user", "stopped before its first step")
        wait_for(
            lambda job=job: Escala().job(job).attempts[0].delivered, 60, "its run is delivered", every=0.2
        )
        assert Escala().run(job).status == "killed"

    early = Escala().submit("pretrain", (), OVERRIDES).id
    waiting = Escala().submit("pretrain", (), OVERRIDES, {"after": early}).id
    wait_for(lambda: Escala().job(early).job.state != "queued", 60, "it starts", every=0.02)
    began = time.monotonic()
    Escala().stop(early)
    wait_for(lambda: Escala().job(early).job.state == "stopped", 60, "it is stopped", every=0.05)
    seconds["early"] = time.monotonic() - began
    refused = ended(waiting)
    assert (refused.job.state, refused.job.reason, refused.job.attempts) == ("failed", "dependency", 0)
    print(seconds)
    assert max(seconds.values()) < STOPPED_SECONDS, seconds
