"""The demo as a newcomer runs it, in a home of its own: it ends in time, learns, and says where to look."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

MINUTES = 8


@pytest.mark.docs
@pytest.mark.timeout(60 * (MINUTES + 2))
def test_the_demo_learns_in_time(home: Path) -> None:
    escala = [sys.executable, "-m", "escala.cli.main"]
    began = time.monotonic()
    try:
        done = subprocess.run([*escala, "demo"], capture_output=True, text=True, timeout=60 * (MINUTES + 1))
    finally:
        took = time.monotonic() - began
        subprocess.run([*escala, "down"], check=True)
    assert done.returncode == 0, done.stderr
    losses = re.search(r"held-out loss +([\d.]+) -> ([\d.]+)", done.stdout)
    assert losses
    assert float(losses[2]) < float(losses[1]) - 2
    assert "run in MLflow   http://127.0.0.1:" in done.stdout
    assert "next            escala runs show" in done.stdout
    assert took < 60 * MINUTES
