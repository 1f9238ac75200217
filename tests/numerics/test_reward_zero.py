"""A reward model under ZeRO-3 on two real gloo processes against plain PyTorch on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.numerics.ranks import run_ranks


def test_a_reward_model_under_zero3_follows_plain_pytorch(tmp_path: Path) -> None:
    results, _ = run_ranks("reward_scenarios:scenario", 2, tmp_path)
    assert results["plain"][-1] < results["plain"][0] < 1
    assert results["zero3"] == pytest.approx(results["plain"], rel=1e-4)
