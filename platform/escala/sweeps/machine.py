"""What this machine does in a second, measured for a few: as many processes as the demo has, training at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from escala.contract.errors import ClusterError
from escala.sweeps.demo_space import BATCH_SEQUENCES, MachineSpeed, shapes

MODULE = "workloads.speed"  # trains; known by name, as the entry points of jobs are
PROCESSES = 2
SECONDS = 2.0  # of each shape
LIMIT_SECONDS = 300.0


def measure(base: Mapping[str, Any]) -> MachineSpeed:
    """The mean speed of PROCESSES that train the smallest and the largest size side by side.

    Raises ClusterError where one fails.
    """
    asked = {
        "models": shapes(base),
        "batch_sequences": BATCH_SEQUENCES,
        "seconds": SECONDS,
    }
    command = [sys.executable, "-m", MODULE, json.dumps(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(PROCESSES)
    ]
    return _mean([_answer(process) for process in started])


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise ClusterError(
            f"this machine trained no step in {LIMIT_SECONDS:.0f} seconds", "try again when it is less busy"
        ) from error
    if process.returncode:
        raise ClusterError(
            f"the measurement of this machine failed: {err.strip()[-300:]}", "escala status; then try again"
        )
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def _mean(answers: Sequence[Mapping[str, Any]]) -> MachineSpeed:
    count = len(answers)
    small, large = (sum(each["flops_per_second"][i] for each in answers) / count for i in (0, 1))
    return MachineSpeed(small, large, sum(each["share"] for each in answers) / count)
