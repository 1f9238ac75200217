"""The demo as a newcomer runs it, in a home of its own: it ends in time, and what it says adds up."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

MINUTES = 10


@pytest.mark.docs
@pytest.mark.timeout(60 * (MINUTES + 2))
def test_the_demo_goes_from_a_sweep_to_a_law_to_a_run(home: Path) -> None:
    escala = [sys.executable, "-m", "escala.cli.main"]
    began = time.monotonic()
    try:
        done = subprocess.run([*escala, "demo"], capture_output=True, text=True, timeout=60 * (MINUTES + 1))
    finally:
        took = time.monotonic() - began
        subprocess.run([*escala, "down"], check=True)
    said = done.stdout
    assert done.returncode == 0, done.stderr
    assert "points    14" in said
    assert "demo@1   loss = L_inf + a N^-alpha + b D^-beta" in said
    if "no plan" not in said:  # a law may refuse to plan, and say why
        predicted = re.search(
            r"predicted +([\d.]+) nats per token +\(90 % predictive interval ([\d.]+) to ([\d.]+)\)", said
        )
        obtained = re.search(r"obtained +([\d.]+) nats per token", said)
        assert predicted
        assert obtained
        assert float(predicted[2]) < float(predicted[1]) < float(predicted[3])
        assert float(obtained[1]) == pytest.approx(float(predicted[1]), rel=0.15)
        before = re.search(r"before +([\d.]+) nats per token", said)
        assert before
        assert float(before[1]) > float(obtained[1])
        assert "in MLflow       http://127.0.0.1:" in said
        assert "next            escala laws show demo@1" in said
    assert took < 60 * MINUTES
