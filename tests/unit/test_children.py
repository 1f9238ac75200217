"""Runs whose writer was killed are closed: as KILLED where a user stopped the attempt, as FAILED where it was lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from escala.contract.records import AttemptSpec, JobFiles, Outcome, TrialFiles, write_json
from escala.sweeps.design import Trial
from escala.sweeps.trials import PlannedTrial, write_planned
from escala.tracking.children import SWEEP_ATTEMPT_TAG, FamilyDelivery
from escala.tracking.delivery import Delivery
from escala.tracking.spool import SpoolTracker


class Runs:
    """A tracker that remembers how runs ended."""

    def __init__(self) -> None:
        self.ended: dict[str, str] = {}

    def start(self, key: str, *_: object) -> str:
        return key

    def metrics(self, *_: object) -> None: ...
    def tags(self, *_: object) -> None: ...
    def text(self, *_: object) -> None: ...

    def lifecycle(self, run_id: str) -> str:
        return "active"

    def finish(self, run_id: str, status: str, time_ms: int | None = None) -> None:
        self.ended[run_id] = status


def begin(directory: Path, key: str) -> SpoolTracker:
    tracker = SpoolTracker(directory)
    tracker.start(key, "tests", key, {}, {})
    return tracker


@pytest.mark.parametrize(
    ("outcome", "lost", "status"),
    [
        (Outcome("user", "stopped before its first step"), False, "KILLED"),
        (Outcome("budget", "stopped before its first step"), False, "KILLED"),
        (None, True, "FAILED"),
    ],
)
def test_a_sweep_and_its_trials_are_closed_the_same(
    tmp_path: Path, outcome: Outcome | None, lost: bool, status: str
) -> None:
    sweep = JobFiles(tmp_path, "j1").attempt(1)
    trial = TrialFiles(tmp_path, "f" * 8).attempt(1)
    for files in (sweep, trial):
        files.directory.mkdir(parents=True)
    begin(sweep.spool, "j1-1")
    begin(trial.spool, "trial")
    tags = {SWEEP_ATTEMPT_TAG: "j1-1"}
    where = {"directory": str(trial.directory), "checkpoints": "", "data": "", "tracking_uri": ""}
    write_json(
        trial.spec, AttemptSpec("j1", 1, "t", "pretrain", "x", {}, experiment="tests", tags=tags, **where)
    )
    write_planned(tmp_path, "j1", [PlannedTrial(1, "f" * 8, Trial({}, {}, 1, 1, 1, 1, 1.0))])
    if outcome is not None:
        write_json(sweep.outcome, outcome)
    runs = Runs()
    family = FamilyDelivery(Delivery(lambda: runs), tmp_path)
    assert family.deliver(sweep.directory, lost)
    assert runs.ended == {"j1-1": status, "trial": status}


def test_a_driver_that_stopped_as_asked_may_be_killed_before_it_closes_its_run(tmp_path: Path) -> None:
    files = JobFiles(tmp_path, "j1").attempt(1)
    files.directory.mkdir(parents=True)
    begin(files.spool, "j1-1")
    write_json(files.outcome, Outcome("user", record={"run_id": "j1-1"}))
    runs = Runs()
    assert FamilyDelivery(Delivery(lambda: runs), tmp_path).deliver(files.directory, False)
    assert runs.ended == {"j1-1": "KILLED"}
