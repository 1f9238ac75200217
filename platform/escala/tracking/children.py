"""Delivery of a sweep's runs: its own, then its trials' as children of it in MLflow."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from escala.records import STOP_REASONS, TRIALS, AttemptFiles, AttemptSpec, Outcome, TrialFiles, read_record
from escala.tracking.delivery import Delivery
from escala.tracking.spool import close_spool

log = logging.getLogger("escala.delivery")
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its pages show the child under its parent
SWEEP_ATTEMPT_TAG = "escala.sweep_attempt"  # JOB-ATTEMPT, on a trial's attempt


class FamilyDelivery:
    """Delivers the spool of an attempt and, of a sweep's attempt, those of the trials' attempts that it started.

    Args:
        home: holds `jobs` and `trials`.
        ended: told the directory of each attempt that has ended and is delivered whole, perhaps again after a
            restart; true where it added to the run's spool.
    """

    def __init__(
        self, delivery: Delivery, home: Path, ended: Callable[[Path], bool] = lambda directory: False
    ) -> None:
        self._delivery, self._home, self._ended = delivery, home, ended
        self._settled: set[tuple[Path, Path]] = set()  # (sweep, trial) not to be looked at again

    def deliver(self, directory: Path, lost: bool) -> bool:
        """As `Delivery.deliver`. `lost`: the attempt's driver was, so that nobody else closes the runs."""
        files = AttemptFiles(directory)
        closed_as = _closed_as(files, lost)
        if closed_as is not None:
            close_spool(files.spool, closed_as)
        over = lost or files.outcome.exists()
        done = self._delivery.deliver(files.spool)
        if done and over and self._look_back(directory):
            done = self._delivery.deliver(files.spool)
        children = [
            self._child(files, trial, last, over, closed_as or "FAILED")
            for trial, last in self._children(files)
        ]
        return done and all(children)

    def _children(self, files: AttemptFiles) -> Iterator[tuple[AttemptFiles, bool]]:
        """Attempts of the trials of this attempt's sweep that are not settled, and whether each is its trial's last."""
        planned = files.directory.parent / TRIALS
        if not planned.exists():
            return
        for line in planned.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                continue
            attempts = TrialFiles(self._home, json.loads(line)["fingerprint"]).attempts()
            for attempt in attempts:
                if (files.directory, attempt.directory) not in self._settled:
                    yield attempt, attempt is attempts[-1]

    def _child(
        self, sweep: AttemptFiles, trial: AttemptFiles, last: bool, over: bool, closed_as: str
    ) -> bool:
        key = (sweep.directory, trial.directory)
        spec = read_record(AttemptSpec, trial.spec)
        mine = f"{sweep.directory.parent.name}-{sweep.directory.name.removeprefix('attempt-')}"
        if spec is None or spec.tags.get(SWEEP_ATTEMPT_TAG) != mine:
            if spec is not None:
                self._settled.add(key)  # another sweep's, or another attempt's, which delivers it
            return True
        parent = sweep.spool / "run_id"
        if not parent.exists():
            return False
        ended = trial.outcome.exists()
        if not ended and (over or not last):
            close_spool(trial.spool, closed_as)
            ended = True
        if not self._delivery.deliver(trial.spool, {PARENT_TAG: parent.read_text().strip()}):
            return False
        if ended and self._look_back(trial.directory) and not self._delivery.deliver(trial.spool):
            return False
        if ended:
            self._settled.add(key)
        return ended

    def _look_back(self, directory: Path) -> bool:
        """Tell `ended`; its trouble is logged, and holds no delivery up."""
        try:
            return self._ended(directory)
        except Exception:
            log.exception("%s was not compared with the laws", directory)
            return False


def _closed_as(files: AttemptFiles, lost: bool) -> str | None:
    """How the runs of an attempt are closed whose driver was killed; None where it closed them itself.

    A driver that stops as asked leaves its record in the outcome. One that was stopped while it started left none.
    """
    if lost:
        return "FAILED"
    outcome = read_record(Outcome, files.outcome)
    stopped = outcome is not None and outcome.kind in STOP_REASONS and outcome.record is None
    return "KILLED" if stopped else None
