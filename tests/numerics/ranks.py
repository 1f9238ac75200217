"""A script as several real processes of one gloo group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

SECONDS = 500  # on a machine that does other things, too


def run_ranks(script: Path, ranks: int, directory: Path) -> None:
    """Run `python SCRIPT RANK RANKS DIRECTORY` for every rank at once; all must end well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(ranks), str(directory)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in started:
            process.kill()  # one rank without the other would wait for it
            process.wait()


def leave() -> NoReturn:
    """End this rank, whose results are written, as soon as all ranks are here. Without the interpreter's own end: there
    gloo's threads, which DeepSpeed's engines still hold, now and then terminate the process.
    """
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
