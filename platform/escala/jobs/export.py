"""`escala export`: a run's newest checkpoint in Hugging Face's format, written by a process that may import torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from escala import manifests
from escala.errors import EscalaError, NotFoundError, SpecError, StateError
from escala.jobs.service import SWEEP, open_store
from escala.records import JobFiles
from escala.settings import Settings

ENTRY_POINT = "workloads.export"


def export(name: str, to: str | Path) -> Path:
    """Write the newest good checkpoint of a run, and its tokenizer, into a new directory; returns its path.

    transformers (AutoModelForCausalLM, AutoTokenizer) and vLLM open it.

    Args:
        name: a run's id (or its start), or a job's id or name.
        to: absent or empty.

    Raises:
        NotFoundError: there is no such run, or it has no good checkpoint.
        StateError: `name` is a sweep, which has no checkpoint of its own.
        SpecError: `to` is not empty.
        EscalaError: what the exporting process says (CheckpointError, DataError).
    """
    to = Path(to).expanduser().absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise SpecError(f"{to} exists and is not an empty directory", "give --to a new directory")
    directory = _checkpoints(name)
    checkpoint, refused = manifests.latest(directory)
    if checkpoint is None:
        why = f": {refused[0].message}" if refused else ""
        raise NotFoundError(
            f"{name} has no good checkpoint in {directory}{why}",
            "wait for its first one, or escala jobs retry it",
        )
    command = [sys.executable, "-m", ENTRY_POINT, str(checkpoint.path)]
    command += ["--to", str(to), "--data", str(Settings().home / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _explained(done)
    return to


def _checkpoints(name: str) -> Path:
    """The checkpoint directory of a job, or of the job or trial whose attempt is the run with this id."""
    home = Settings().home
    try:
        with open_store() as store:
            job = store.get(name)
    except NotFoundError as unknown:
        runs = (
            path for root in ("jobs", "trials") for path in (home / root).glob("*/attempt-*/tracking/run_id")
        )
        found = {path.parents[2] for path in runs if path.read_text().strip().startswith(name)}
        if not name or not found:
            raise NotFoundError(f"there is no run and no job {name!r} in {home}", unknown.hint) from unknown
        if len(found) > 1:
            raise NotFoundError(
                f"the runs of {len(found)} jobs begin with {name!r}", "give more of the id"
            ) from unknown
        return found.pop() / "checkpoints"
    if job.workload == SWEEP:
        raise StateError(
            f"job {job.id} is a sweep, which has no checkpoint of its own",
            "give one of its runs: escala runs list",
        )
    return JobFiles(home, job.id).checkpoints


def _explained(done: subprocess.CompletedProcess[str]) -> EscalaError:
    """The error that the exporting process wrote, else what it last said."""
    lines = done.stdout.strip().splitlines()
    try:
        said = json.loads(lines[-1])
        kind = next(kind for kind in EscalaError.__subclasses__() if kind.exit_code == done.returncode)
        return kind(said["message"], said["hint"])
    except (IndexError, ValueError, KeyError, TypeError, StopIteration):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return EscalaError(
            f"the export ended with exit code {done.returncode}: {last}",
            f"run it yourself: {' '.join(done.args)}",
        )
