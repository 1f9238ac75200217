"""Tiny sweeps, and the one that is killed on its way."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import psutil

from escala import Escala, spec
from escala.contract.records import TrialFiles
from escala.documents import dump
from escala.settings import Settings
from escala.sweeps.trials import finished, read_planned
from escala.views.jobs import JobDetailsView
from tests.conftest import wait_for
from tests.faults.victims import ended

BASE = {
    "model": {"vocab_size": 512, "n_layers": 2, "d_model": 32, "n_heads": 2, "max_context_tokens": 32},
    "data": {
        "tokenizer": {"vocab_size": 512, "train_characters": 300_000},
        "max_characters": 2_000_000,
        "held_out_fraction": 0.2,
    },
    "training": {"batch_sequences": 8, "evaluation_tokens": 4096, "log_every_steps": 10},
}
VARY = {"tokens": [steps * 8 * 32 for steps in (64, 128, 256)]}  # branches of a trunk a seed
WSD = {"training": {"optimizer": {"schedule": "wsd"}}}
SEEDS = [0, 1]


@dataclass(frozen=True)
class Killed:
    """A sweep whose driver was killed once, after it has ended all the same."""

    space: str
    job: str
    before: list[str]  # fingerprints of the trials that had ended when it was killed
    details: JobDetailsView


def write(directory: Path, name: str, **keys: object) -> str:
    """A space in a file."""
    path = directory / f"{name}.yaml"
    path.write_text(dump({"base": BASE, **keys}))
    return str(path)


def _branched(directory: Path) -> str:
    return write(directory, "killed", vary=VARY, seeds=SEEDS, branch="tokens", base=spec.merge(BASE, WSD))


def losses(job_id: str) -> dict[str, float]:
    """Held-out loss by trial."""
    points = Escala().sweep_points(job_id).points
    return {point["trial"]: point["loss_nats"] for point in points}


def attempts(job_id: str) -> list[int]:
    """How many each trial has had."""
    home = Settings().home
    return [len(TrialFiles(home, p.fingerprint).attempts()) for p in read_planned(home, job_id)]


def kill_on_its_way(directory: Path) -> Killed:
    """Kill the driver after up to four trials, while one begins, which cannot end before it is killed, too. The other
    that runs is anywhere.
    """
    space, home = _branched(directory), Settings().home
    job, after = Escala().sweep(space).id, random.randrange(5)

    def reached() -> bool:
        trials = [TrialFiles(home, p.fingerprint) for p in read_planned(home, job)]
        begun = [files.attempts()[-1] for files in trials if files.attempts() and not finished(files)]
        one_begins = any(any(f.spool.glob("events-*")) and not f.progress.exists() for f in begun)
        return one_begins and sum(finished(files) is not None for files in trials) >= after

    wait_for(lambda: read_planned(home, job), 120, "its trials are planned")
    started = ((p, p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    driver = [process for process, line in started if f"jobs/{job}/attempt-1" in " ".join(line)]
    wait_for(reached, 240, f"a trial begins, and {after} have ended", every=0.02)
    for process in driver:
        process.kill()
    before = [p.fingerprint for p in read_planned(home, job) if finished(TrialFiles(home, p.fingerprint))]
    return Killed(space, job, before, ended(job))
