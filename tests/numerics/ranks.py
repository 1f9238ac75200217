"""A scenario as several real processes of one gloo group, forked from a server that has imported torch and DeepSpeed.

The server starts with the first scenario and serves the session: a rank starts in milliseconds, with no group, engine,
seed or setting of another scenario, and may end as it likes. It forks before anything has run in it, so there is no
thread to lose (jemalloc's own takes care of itself).
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Iterable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 300  # on a machine that does other things, too
_FORKSERVER = multiprocessing.get_context("forkserver")
_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"  # and with it torch's compiler: 3.5 s of a process's first engine
_FORKSERVER.set_forkserver_preload(["pytest", "workloads.ppo", "workloads.dpo", "workloads.reward", _MUON])


def run_ranks(scenario: str, ranks: int, directory: Path, seconds: float = SECONDS) -> list[Any]:
    """What the function `scenario` (MODULE:NAME, in tests.numerics) makes of `directory` on each of `ranks` processes
    at once, each with one thread and the group. Only they import what it needs.

    Raises AssertionError with the output of the rank that failed, or of all after `seconds`; no rank outlives the call.
    """
    with tempfile.TemporaryDirectory(dir=directory) as name:
        scratch = Path(name)
        started = [
            _FORKSERVER.Process(target=_rank, args=(scenario, rank, ranks, directory, scratch))
            for rank in range(ranks)
        ]
        try:
            for process in started:
                process.start()
            _await(started, scratch, seconds)
        finally:
            for process in started:
                if process.pid is not None:
                    process.kill()  # one rank without the other would wait for it
                    process.join()
        return [torch.load(scratch / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _await(started: list[ForkServerProcess], scratch: Path, seconds: float) -> None:
    """Wait until all have ended well."""
    deadline = time.monotonic() + seconds
    while running := [process for process in started if process.exitcode is None]:
        if not wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic())):
            for process in running:
                process.terminate()  # it writes where it waits
                process.join(10)
            raise AssertionError(f"ranks not over within {seconds} s{_said(range(len(started)), scratch)}")
        failed = [rank for rank, process in enumerate(started) if process.exitcode]
        if failed:
            codes = {rank: started[rank].exitcode for rank in failed}
            raise AssertionError(f"exit codes by rank: {codes}{_said(failed, scratch)}")


def _said(ranks: Iterable[int], scratch: Path) -> str:
    logs = {rank: scratch / f"{rank}.log" for rank in ranks}
    said = {rank: log.read_text(errors="replace")[-3000:] for rank, log in logs.items() if log.exists()}
    return "".join(f"\n--- rank {rank} ---\n{text}" for rank, text in said.items())


def _rank(scenario: str, rank: int, ranks: int, directory: Path, scratch: Path) -> None:
    with (scratch / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGTERM, chain=True)
    gc.freeze()  # DeepSpeed collects for each engine: 0.3 s with all that is imported
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = f"file://{scratch}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=SECONDS), rank=rank, world_size=ranks)
    work = resolve_name(f"tests.numerics.{scenario}")
    torch.save(work(directory), scratch / f"{rank}.pt")
    dist.barrier()
    # Without the interpreter's own end: there gloo's threads, which DeepSpeed's engines still hold, now and then
    # terminate the process.
    os._exit(0)
