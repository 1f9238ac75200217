"""Trials on disk: HOME/trials/FINGERPRINT, laid out like a job, so that a finished one is found again by any sweep.

The fingerprint is of all that decides a trial's loss: its resolved configuration, the documents and the tokenizer
that it reads, and the code of the workloads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from escala.contract import handshake, lines
from escala.contract.files import insist, write_whole
from escala.contract.records import (
    AttemptSpec,
    JobFiles,
    Outcome,
    TrialFiles,
    TrunkFiles,
    read_record,
    write_json,
)
from escala.schema.workloads import get_workload
from escala.storage.locks import locked
from escala.sweeps.design import Trial, trunk_config
from escala.tracking.children import SWEEP_ATTEMPT_TAG
from escala.tracking.lineage import fingerprint, source_fingerprint

FINAL = ("succeeded", "diverged")  # what the same configuration would give again
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class PlannedTrial:
    """A line of JobFiles.trials: a trial of one sweep, and the directory that holds what became of it."""

    number: int  # in this sweep, from 1
    fingerprint: str
    trial: Trial
    trunk: str | None = None  # fingerprint of what its branches share; None: it is trained alone

    @property
    def name(self) -> str:
        """For people, in MLflow and logs."""
        return f"{self.number:03d} {self.trial.label}"


@lru_cache(maxsize=1)
def _workloads() -> str:
    return source_fingerprint(
        ("workloads", "escala.schema")
    )  # what computes, and FLOPs with what they are of


def trial_fingerprint(config: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """The identity of a trial; `data` holds the fingerprints of corpus, tokenizer and evaluation set."""
    return fingerprint({"config": dict(config), "data": dict(data), "workloads": _workloads()})


def trunk_fingerprint(config: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """The identity of the trunk of a branch: of all that decides its steps before the decay."""
    return trial_fingerprint(trunk_config(config), data)


def by_trunk(planned: Sequence[PlannedTrial]) -> list[list[int]]:
    """The numbers of the trials that run one after another, in one process: branches of a trunk, else one each."""
    groups: dict[str, list[int]] = {}
    for each in planned:
        groups.setdefault(each.trunk or each.fingerprint, []).append(each.number)
    return list(groups.values())


def last_outcome(files: TrialFiles) -> Outcome | None:
    """How the trial's last attempt ended; None where it has not, or there is none."""
    attempts = files.attempts()
    return read_record(Outcome, attempts[-1].outcome) if attempts else None


def finished(files: TrialFiles) -> Outcome | None:
    """The outcome, where another attempt would only repeat it."""
    outcome = last_outcome(files)
    return outcome if outcome is not None and outcome.kind in FINAL else None


def new_attempt(
    files: TrialFiles, workload: str, aim: str, sweep: AttemptSpec, planned: PlannedTrial
) -> AttemptSpec:
    """Make the next attempt's directory, and move the fence to it."""
    number = len(files.attempts()) + 1
    attempt = files.attempt(number)
    attempt.directory.mkdir(parents=True)
    spec = AttemptSpec(
        job_id=sweep.job_id,
        attempt=number,
        name=f"{sweep.name} {planned.name}",
        workload=workload,
        entry_point=get_workload(workload).entry_point,
        config=planned.trial.config,
        directory=str(attempt.directory),
        checkpoints=str(files.checkpoints),
        trunk=str(TrunkFiles(files.directory.parents[1], planned.trunk).checkpoints)
        if planned.trunk
        else None,
        data=sweep.data,
        tracking_uri=f"spool:{attempt.spool}",
        experiment=sweep.experiment,
        tags={
            **sweep.tags,
            "escala.sweep": sweep.name,
            SWEEP_ATTEMPT_TAG: f"{sweep.job_id}-{sweep.attempt}",
            "escala.trial": planned.fingerprint,
            "escala.aim": aim,
            **({"escala.trunk": planned.trunk} if planned.trunk else {}),
        },
        run_key=f"trial-{planned.fingerprint}-{number}",
        versions=handshake.versions(),
    )
    write_json(attempt.spec, spec)
    write_json(attempt.current, number)
    return spec


@contextmanager
def held(files: TrialFiles | TrunkFiles) -> Iterator[None]:
    """Hold the trial or the trunk, so that two sweeps do not train it at once; the kernel frees it with its holder."""
    files.directory.mkdir(parents=True, exist_ok=True)
    with locked(files.lock, every=POLL_SECONDS):  # until the other sweep's attempt has ended
        yield


@contextmanager
def held_trunk(home: Path, trunk: str | None) -> Iterator[None]:
    """Hold a trunk while its branches are trained; nothing for a trial without one."""
    if trunk is None:
        yield
        return
    with held(TrunkFiles(home, trunk)):
        yield


def end_trunk(home: Path, job_id: str, trunk: str | None) -> None:
    """Free a trunk's checkpoint once all its branches of the sweep have ended. Its holder calls it."""
    branches = [p for p in read_planned(home, job_id) if trunk is not None and p.trunk == trunk]
    if trunk is not None and all(finished(TrialFiles(home, p.fingerprint)) for p in branches):
        shutil.rmtree(TrunkFiles(home, trunk).checkpoints, ignore_errors=True)


def write_planned(home: Path, job_id: str, planned: Sequence[PlannedTrial]) -> None:
    """Write the sweep's trials, all of them, before the first one starts."""
    write_whole(JobFiles(home, job_id).trials, b"".join(_line(p) for p in planned))


def append_planned(home: Path, job_id: str, planned: PlannedTrial) -> None:
    """Add a trial that an optimiser has just chosen; safe from several processes at once."""
    path, line = JobFiles(home, job_id).trials, _line(planned)
    insist(lambda: lines.append(path, line), f"the trials of {job_id}")


def read_planned(home: Path, job_id: str) -> list[PlannedTrial]:
    """The sweep's trials, each once; empty before its driver has started. Damaged lines are left out."""
    found: dict[str, PlannedTrial] = {}
    for row in lines.objects(JobFiles(home, job_id).trials):
        with suppress(KeyError, TypeError):
            trial = PlannedTrial(
                int(row["number"]), str(row["fingerprint"]), Trial(**row["trial"]), row.get("trunk")
            )
            found.setdefault(trial.fingerprint, trial)
    return sorted(found.values(), key=lambda p: p.number)


def _line(planned: PlannedTrial) -> bytes:
    return json.dumps(asdict(planned), separators=(",", ":")).encode() + b"\n"
