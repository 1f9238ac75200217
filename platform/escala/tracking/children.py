"""Delivery of a sweep's runs: its own, then its trials' as children of it in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from escala.contract import lines
from escala.contract.files import no_room
from escala.contract.records import (
    TRIALS,
    AttemptFiles,
    AttemptSpec,
    Outcome,
    RunRecord,
    TrialFiles,
    read_record,
)
from escala.tracking.delivery import Delivery
from escala.tracking.lineage.lifecycle import identity_tags, run_key, run_name, run_status
from escala.tracking.lineage.notes import NOTE_TAG, run_note
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
        self._closed: set[Path] = set()  # attempts that have ended, and whose spools tell so

    def deliver(self, directory: Path, lost: bool) -> bool:
        """As `Delivery.deliver`. `lost`: the attempt's driver was, so that nobody else closes the runs."""
        files = AttemptFiles(directory)
        over = lost or files.outcome.exists()
        if over:
            self._close(files)
        done = self._delivery.deliver(files.spool)
        if done and over and self._look_back(directory):
            done = self._delivery.deliver(files.spool)
        children = [self._child(files, trial, last, over) for trial, last in self._children(files)]
        return done and all(children)

    def _children(self, files: AttemptFiles) -> Iterator[tuple[AttemptFiles, bool]]:
        """Attempts of the trials of this attempt's sweep that are not settled, and whether each is its trial's last."""
        planned = files.directory.parent / TRIALS
        if not planned.exists():
            return
        for row in lines.objects(planned):
            fingerprint = row.get("fingerprint")
            if not isinstance(fingerprint, str) or not fingerprint.isalnum():
                continue  # not a trial's directory
            attempts = TrialFiles(self._home, fingerprint).attempts()
            for attempt in attempts:
                if (files.directory, attempt.directory) not in self._settled:
                    yield attempt, attempt is attempts[-1]

    def _child(self, sweep: AttemptFiles, trial: AttemptFiles, last: bool, over: bool) -> bool:
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
        ended = ended or over or not last
        if ended:
            killed = over and _status(read_record(Outcome, sweep.outcome), "FAILED") == "KILLED"
            self._close(trial, "KILLED" if killed else "FAILED")
        if not self._delivery.deliver(trial.spool, {PARENT_TAG: parent.read_text().strip()}):
            return False
        if ended and self._look_back(trial.directory) and not self._delivery.deliver(trial.spool):
            return False
        if ended:
            self._settled.add(key)
        return ended

    def _close(self, files: AttemptFiles, without: str = "FAILED") -> None:
        """Complete the spool of an attempt that has ended: a killed driver could not, and what it wrote may be
        damaged. Trouble is logged, and tried again.
        """
        if files.directory in self._closed:
            return
        try:
            spec, outcome = read_record(AttemptSpec, files.spec), read_record(Outcome, files.outcome)
            start, tags = (None, None) if spec is None else (_start(spec), _note(spec, outcome, without))
            close_spool(files.spool, _status(outcome, without), start, tags)
            self._closed.add(files.directory)
        except OSError as error:
            if not no_room(error):  # else the delivery says so
                log.warning("%s cannot be closed now: %s", files.spool, error)

    def _look_back(self, directory: Path) -> bool:
        """Tell `ended`; its trouble is logged, and holds no delivery up."""
        try:
            return self._ended(directory)
        except Exception:
            log.exception("%s was not compared with the laws", directory)
            return False


def _status(outcome: Outcome | None, without: str) -> str:
    """MLflow's word for an attempt that did not close its run by itself; `without` an outcome, that."""
    return without if outcome is None else run_status(outcome)


def _note(spec: AttemptSpec, outcome: Outcome | None, without: str) -> dict[str, str]:
    """The note of an attempt that could not write its own; `without` an outcome, with that end."""
    if outcome is None:
        lost = Outcome("driver_lost", "its driver was killed")
        outcome = Outcome("user", "stopped with its sweep") if without == "KILLED" else lost
    record = RunRecord(
        None,
        spec.job_id,
        spec.attempt,
        spec.name,
        spec.workload,
        outcome.kind,
        started_at=0.0,
        reason=outcome.message or None,
    )
    return {NOTE_TAG: run_note(spec, record, hint=outcome.hint)}


def _start(spec: AttemptSpec) -> dict[str, Any]:
    """What opens the attempt's run, as far as its spec tells."""
    return {
        "key": run_key(spec),
        "experiment": spec.experiment,
        "name": run_name(spec),
        "tags": identity_tags(spec),
        "params": {},
    }
