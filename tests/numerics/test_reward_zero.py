"""A reward model under ZeRO-3 on two real gloo processes against plain PyTorch on the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.numerics.ranks import run_ranks

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("reward_scenarios.py")
RANKS = 2


def test_a_reward_model_under_zero3_follows_plain_pytorch(tmp_path: Path) -> None:
    run_ranks(SCRIPT, RANKS, tmp_path)
    results = json.loads((tmp_path / "0.json").read_text())
    assert results["plain"][-1] < results["plain"][0] < 1
    assert results["zero3"] == pytest.approx(results["plain"], rel=1e-4)
