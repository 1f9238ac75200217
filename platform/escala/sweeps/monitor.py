"""The driver's eye on its trials: progress, budget, requests to stop, and the end of a trial that Tune cut off."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from escala.contract.attempt import request_stop
from escala.contract.files import insist, no_room
from escala.contract.records import (
    AttemptFiles,
    AttemptSpec,
    Control,
    Outcome,
    Progress,
    TrialFiles,
    read_record,
    write_json,
)
from escala.sweeps import trials
from escala.sweeps.trials import PlannedTrial
from escala.tracking.spool import close_spool

SECONDS = 1.0  # between two looks


@dataclass(frozen=True)
class TrialsSpending:
    """By this attempt of the sweep: sums over the trials' attempts that it started."""

    train_tokens: int
    compute_flops: float
    ended: int  # trials with an outcome, by whichever sweep
    losses: tuple[float, ...]  # of the trials that succeeded


class Monitor:
    """Looks at the trials' files once a second.

    Args:
        planned: the trials; an optimiser's are read from the file as they are chosen.
        total: how many there will be; None: the planned ones.
    """

    def __init__(
        self, sweep: AttemptSpec, home: Path, planned: list[PlannedTrial], total: int | None
    ) -> None:
        self._sweep, self._home, self._files = sweep, home, AttemptFiles(sweep.directory)
        self._planned, self._total = planned, total
        self._began, self._looked = time.monotonic(), 0.0
        self._before = {
            p.fingerprint: self._attempts(p) for p in planned
        }  # started by earlier attempts or sweeps
        self._closed: dict[str, TrialsSpending] = {}

    def callback(self) -> Any:
        """For Ray Tune: called between any two of its events."""
        from ray.tune import Callback

        look = self.look

        class Look(Callback):  # type: ignore[misc]  # Ray is untyped to us
            def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
                look()

        return Look()

    def look(self) -> None:
        """Write progress; pass a request to stop on to the trials; ask for one where the budget is spent."""
        if time.monotonic() - self._looked < SECONDS:
            return
        self._looked = time.monotonic()
        if self._total is not None:
            self._planned = trials.read_planned(self._home, self._sweep.job_id)
        spent = self._report()
        flops, seconds = self._sweep.remaining_flops, self._sweep.remaining_seconds
        over = flops is not None and spent.compute_flops >= flops
        if over or (seconds is not None and time.monotonic() - self._began >= seconds):
            request_stop(self._files, "budget")
        control = read_record(Control, self._files.control)
        if control is not None:
            for files in self._running():
                request_stop(files, control.stop)

    def close(self) -> None:
        """After Tune's end: a trial without an outcome was cut off, and gets one."""
        if self._total is not None:
            self._planned = trials.read_planned(self._home, self._sweep.job_id)
        for files in self._running():
            progress = read_record(Progress, files.progress)
            step = f" at step {progress.step} of {progress.total_steps}" if progress else ""
            outcome = Outcome("cut_off", f"ended by the sweep's scheduler, or its process died{step}")
            insist(partial(write_json, files.outcome, outcome), "a trial's outcome")
            insist(partial(close_spool, files.spool, "KILLED"), "a trial's spool")
        self._report()

    def spent(self) -> TrialsSpending:
        """Tokens and FLOPs so far."""
        each = [self._closed.get(p.fingerprint) or self._spent_on(p) for p in self._planned]
        return TrialsSpending(
            sum(s.train_tokens for s in each),
            sum(s.compute_flops for s in each),
            sum(s.ended for s in each),
            tuple(loss for s in each for loss in s.losses),
        )

    def _spent_on(self, planned: PlannedTrial) -> TrialsSpending:
        """One trial's part; remembered once it has ended, since nothing is added to it then."""
        files = TrialFiles(self._home, planned.fingerprint)
        outcome = trials.finished(files)  # before the progress, which is then the last
        loss = (outcome.record or {}).get("held_out_loss_nats") if outcome else None
        tokens, flops = 0, 0.0
        for attempt in files.attempts()[self._before.get(planned.fingerprint, 0) :]:
            progress = read_record(Progress, attempt.progress)
            if progress is not None:
                tokens, flops = tokens + progress.train_tokens, flops + progress.compute_flops
        found = TrialsSpending(tokens, flops, int(outcome is not None), () if loss is None else (loss,))
        if outcome is not None:
            self._closed[planned.fingerprint] = found
        return found

    def _report(self) -> TrialsSpending:
        spent, wall = self.spent(), time.monotonic() - self._began
        progress = Progress(
            step=spent.ended,
            total_steps=self._total or len(self._planned),
            train_tokens=spent.train_tokens,
            compute_flops=spent.compute_flops,
            wall_seconds=wall,
            loss_nats=min(spent.losses, default=None),
            tokens_per_second=spent.train_tokens / wall if wall > 0 else None,
            model_flops_utilization=None,
            updated_at=time.time(),
            remaining_seconds=self._remaining(spent, wall),
        )
        try:
            write_json(self._files.progress, progress)
        except OSError as error:
            if not no_room(error):  # a full disk keeps the last one
                raise
        return spent

    def _remaining(self, spent: TrialsSpending, wall: float) -> float | None:
        """At the speed so far: trials differ in cost, so it follows from FLOPs; None where they are not known."""
        if self._total is not None or not spent.compute_flops:
            return None
        open_ = [p for p in self._planned if p.fingerprint not in self._closed]
        begun = sum(self._spent_on(p).compute_flops for p in open_)
        left = sum(p.trial.own_flops for p in open_) - begun
        return max(0.0, left) / spent.compute_flops * wall

    def _running(self) -> list[AttemptFiles]:
        """Attempts of this sweep that have no outcome yet."""
        found = []
        for planned in self._planned:
            if planned.fingerprint in self._closed:
                continue
            attempts = TrialFiles(self._home, planned.fingerprint).attempts()
            if len(attempts) > self._before.get(planned.fingerprint, 0) and not attempts[-1].outcome.exists():
                found.append(attempts[-1])
        return found

    def _attempts(self, planned: PlannedTrial) -> int:
        return len(TrialFiles(self._home, planned.fingerprint).attempts())
