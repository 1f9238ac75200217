"""Who is to be killed, and when."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

import psutil

from escala import Escala
from escala.contract.records import AttemptFiles, JobFiles, Progress, read_record
from escala.jobs.state import FINAL
from escala.managed import token_path
from escala.processes import Processes
from escala.settings import Settings
from escala.storage.checkpoints import list_checkpoints, open_checkpoints
from escala.views.jobs import JobDetailsView
from tests.conftest import wait_for


def files(job_id: str, attempt: int = 1) -> AttemptFiles:
    """The files of an attempt."""
    return JobFiles(Settings().home, job_id).attempt(attempt)


def at_step(job_id: str, step: int, attempt: int = 1) -> None:
    """Wait until the attempt has reported `step`. Fails where the job ends before."""

    def reached() -> bool:
        assert Escala().job(job_id).job.state not in FINAL, "".join(Escala().logs(job_id))[-3000:]
        progress = read_record(Progress, files(job_id, attempt).progress)
        return progress is not None and progress.step >= step

    wait_for(reached, 300, f"step {step} of {job_id}")


def checkpointed(job_id: str, attempt: int) -> None:
    """Wait until the attempt has written a checkpoint. Fails where the job ends before its first step."""
    at_step(job_id, 1, attempt)
    store = open_checkpoints(JobFiles(Settings().home, job_id).checkpoints)
    wait_for(
        lambda: any(found.manifest["attempt"] == attempt for found in list_checkpoints(store)),
        120,
        f"a checkpoint of attempt {attempt} of {job_id}",
        every=0.02,  # few steps later the victim is dead
    )


def ended(job_id: str) -> JobDetailsView:
    """The job once it has ended."""
    wait_for(lambda: Escala().job(job_id).job.state in FINAL, 300, f"the end of {job_id}", every=0.2)
    return Escala().job(job_id)


def driver(job_id: str) -> psutil.Process:
    """The process of the job's present attempt."""
    directory = str(files(job_id).directory.parent)
    return next(p for p in _of_this_home() if directory in _line(p) and "-m workloads." in _line(p))


def titled(title: str) -> list[psutil.Process]:
    """The session's Ray processes with `title` in their command line: "RayTrainWorker", "ServeController"."""
    return [p for p in _of_this_home() if title in _line(p)]


def sleeping_driver(marker: Path) -> psutil.Process:
    """A driver that the job server starts, and that would not end by itself for a quarter of an hour."""
    settings = Settings()
    code = f"import os, pathlib, time; pathlib.Path('{marker}').write_text(str(os.getpid())); time.sleep(900)"
    headers = {
        "Authorization": f"Bearer {token_path(settings).read_text()}",
        "Content-Type": "application/json",
    }
    body = json.dumps({"entrypoint": f'{sys.executable} -S -c "{code}"'}).encode()
    request = urllib.request.Request(f"{settings.ray_dashboard}/api/jobs/", body, headers)
    urllib.request.urlopen(request, timeout=60).close()
    return psutil.Process(int(wait_for(lambda: marker.exists() and marker.read_text(), 60, "the driver")))


def _of_this_home() -> list[psutil.Process]:
    head = Processes(Settings().home).alive("ray")
    assert head is not None, "the head does not run"
    return head.children(recursive=True)


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
