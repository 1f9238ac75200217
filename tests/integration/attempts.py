"""Helpers for tests that drive `python -m workloads.pretrain` against a real Ray head of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from escala.contract import handshake
from escala.contract.records import AttemptFiles, AttemptSpec, Outcome, Progress, read_record, write_json
from tests.conftest import free_ports, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]


@contextmanager
def ray_head() -> Iterator[dict[str, str]]:
    """A Ray head on free ports; yields the environment that its drivers need. Stopped by its pid."""
    port, dashboard, client = free_ports(3)
    path = os.pathsep.join([str(REPOSITORY / "platform"), str(REPOSITORY)])
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        "RAY_ADDRESS": f"127.0.0.1:{port}",
    }
    ray = str(Path(sys.executable).with_name("ray"))
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        command = [ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
        command += [f"--dashboard-port={dashboard}", f"--temp-dir={directory}", "--num-cpus=8"]
        command += ["--disable-usage-stats", f"--ray-client-server-port={client}"]
        start = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
        with Path(directory, "head.log").open("w") as log:
            head = subprocess.Popen(command, env=start, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: _listens(port) and _listens(dashboard), 90, "the Ray head listens")
            yield environment
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Job:
    """A job's directory, without a control plane: the test makes the attempts."""

    root: Path
    environment: dict[str, str]
    config: dict[str, Any]

    def files(self, attempt: int) -> AttemptFiles:
        """The names in the attempt's directory."""
        return AttemptFiles(self.root / "attempts" / str(attempt))

    def start(self, attempt: int, **fields: Any) -> subprocess.Popen[bytes]:
        """Start `python -m workloads.pretrain` for a new attempt; its output goes to its log."""
        files = self.files(attempt)
        files.directory.mkdir(parents=True)
        spec = AttemptSpec(
            job_id="job",
            attempt=attempt,
            name="test",
            workload="pretrain",
            entry_point="workloads.pretrain",
            config=self.config,
            directory=str(files.directory),
            checkpoints=str(self.root / "checkpoints"),
            data=str(self.root / "data"),
            tracking_uri=f"spool:{files.spool}",
            experiment="tests",
            versions=handshake.versions(),
            **fields,
        )
        write_json(files.spec, spec)
        files.current.write_text(str(attempt))
        command = [sys.executable, "-u", "-m", "workloads.pretrain", str(files.spec)]
        with files.log.open("wb") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def run(self, attempt: int, **fields: Any) -> Outcome:
        """Run an attempt to its end."""
        return self.end(attempt, self.start(attempt, **fields))

    def end(self, attempt: int, process: subprocess.Popen[bytes]) -> Outcome:
        """Wait for an attempt's end; its outcome."""
        process.wait(timeout=300)
        outcome = read_record(Outcome, self.files(attempt).outcome)
        assert outcome is not None, self.files(attempt).log.read_text()[-3000:]
        return outcome

    def wait_for_step(self, attempt: int, step: int, process: subprocess.Popen[bytes]) -> None:
        """Wait until the attempt has done `step` steps."""

        def reached() -> bool:
            assert process.poll() is None, self.files(attempt).log.read_text()[-3000:]
            progress = read_record(Progress, self.files(attempt).progress)
            return progress is not None and progress.step >= step

        wait_for(reached, 240, f"step {step}")

    def facts(self, attempt: int) -> dict[str, Any]:
        """What rank 0 left."""
        facts: dict[str, Any] = json.loads(self.files(attempt).facts.read_text())
        return facts
