"""A run's newest checkpoint, written for other libraries by a process of its own: nothing here knows tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from escala.contract.errors import CheckpointError, NotFoundError, SpecError
from escala.contract.records import JobFiles
from escala.jobs.actions import job
from escala.jobs.tracked_runs import run
from escala.runtime_env import source_paths
from escala.schema.compression import Precision
from escala.schema.workloads import get_workload
from escala.settings import Settings

ENTRY_POINT = "workloads.export"


def export(
    settings: Settings, name: str, to: Path, adapter: bool = False, gguf: Precision | None = None
) -> Path:
    """Write the newest checkpoint of a run or a job into `to`, for transformers, vLLM, or (`adapter`) peft; with `gguf`
    as a GGUF file for llama.cpp and transformers, its matrices in that precision where they are not in codes already.

    Raises NotFoundError, SpecError where `to` holds something, CheckpointError with the process's own words.
    """
    try:
        found = job(settings, name).job
    except NotFoundError:
        found = job(settings, run(settings, name).job_id).job
    if get_workload(found.workload).result == "points":
        raise SpecError(
            f"job {found.id} is a {found.workload}, which has no checkpoint of its own",
            "submit its best spec as a job",
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise SpecError(f"{to} is there and not empty", "give a new directory")
    if adapter and gguf is not None:
        raise SpecError("deltas alone are not written as GGUF", "give --adapter or --gguf, not both")
    checkpoints = JobFiles(settings.home, found.id).checkpoints
    command = [sys.executable, "-m", ENTRY_POINT, str(checkpoints), str(to.absolute())]
    paths = os.pathsep.join([*source_paths(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *(["--adapter"] if adapter else []), *([f"--gguf={gguf}"] if gguf else [])],
        env={**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        message, _, hint = done.stderr.strip().partition("\n  hint: ")
        raise CheckpointError(message.splitlines()[-1] if message else "the export was killed", hint)
    return to
