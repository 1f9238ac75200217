"""The demos as a newcomer runs them, in a home of their own: they end in time, and what they say adds up."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

MINUTES = {"law": 12, "rlhf": 12}  # within which each must end

pytestmark = pytest.mark.timeout(60 * (max(MINUTES.values()) + 2))


def demo(story: str) -> str:
    """What it prints; it must end well, and in time."""
    escala = [sys.executable, "-m", "escala.cli.main"]
    began, limit = time.monotonic(), 60 * MINUTES[story]
    try:
        done = subprocess.run([*escala, "demo", story], capture_output=True, text=True, timeout=limit + 60)
    finally:
        took = time.monotonic() - began
        subprocess.run([*escala, "down"], check=True)
    assert done.returncode == 0, done.stderr
    assert took < limit
    return done.stdout


@pytest.mark.docs(minutes=6)
def test_the_demo_goes_from_a_sweep_to_a_law_to_a_run(home: Path) -> None:
    said = demo("law")
    assert "sizes     14 runs" in said
    assert "points    14" in said
    assert "demo@1   loss = L_inf + " in said
    assert "prior alpha" in said
    predicted = re.search(
        r"predicted +([\d.]+) nats per token +\(90 % predictive interval ([\d.]+) to ([\d.]+)\)", said
    )
    obtained = re.search(r"obtained +([\d.]+) nats per token", said)
    assert predicted
    assert obtained
    assert float(predicted[2]) < float(predicted[1]) < float(predicted[3])
    assert float(obtained[1]) == pytest.approx(float(predicted[1]), rel=0.1)
    before = re.search(r"before +([\d.]+) nats per token", said)
    assert before
    assert float(before[1]) > float(obtained[1])
    assert re.search(r"verdict +a .*law.* was [\d.]+% off, and the loss is (inside|OUTSIDE)", said)
    assert "in MLflow       http://127.0.0.1:" in said
    assert "next            escala laws show demo@1" in said


@pytest.mark.docs(minutes=10)
def test_the_demo_of_rlhf_teaches_a_policy_what_raters_like(home: Path) -> None:
    said = demo("rlhf")
    accuracy = re.search(r"agree with the reward model on ([\d.]+)%", said)
    assert accuracy
    assert float(accuracy[1]) > 65
    rows = {
        name: tuple(map(float, found))
        for name, *found in re.findall(r"^([a-zA-Z][^\n]*?) {2,}(-?[\d.]+) +(-?[\d.]+)$", said, re.MULTILINE)
    }
    before, after = rows["reward model's score"]
    assert after > before + 0.5
    before, after = rows["raters whom it never saw, -4 to 4"]
    assert after > before
    before, after = rows["KL from the start, nats a response"]
    assert before == 0
    assert 0.5 < after < 8
    assert len(re.findall(r"^(?:before|after) +'I feel", said, re.MULTILINE)) == 2
    assert "in MLflow       http://127.0.0.1:" in said
