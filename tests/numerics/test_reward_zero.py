"""A reward model under ZeRO-3 on two real gloo processes against plain PyTorch on the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("reward_scenarios.py")
RANKS = 2


def test_a_reward_model_under_zero3_follows_plain_pytorch(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(RANKS), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    results = json.loads((tmp_path / "0.json").read_text())
    assert results["plain"][-1] < results["plain"][0] < 1
    assert results["zero3"] == pytest.approx(results["plain"], rel=1e-4)
