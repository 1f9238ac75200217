"""LoRA and DPO under ZeRO-3 on two real gloo processes against plain PyTorch on the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.numerics.ranks import run_ranks


def test_deltas_under_zero3_follow_plain_pytorch_and_are_all_that_is_saved(tmp_path: Path) -> None:
    results, _ = run_ranks("lora_scenarios:scenario", 2, tmp_path)
    for name in ("", "coded_"):
        _check(results[f"{name}zero3"], results[f"{name}plain"])
    assert results["coded_plain"] != results["plain"]  # another base


def _check(found: dict[str, Any], plain: list[float]) -> None:
    assert plain[0] == pytest.approx(0.6931, abs=1e-3)  # the policy starts as its reference
    assert plain[-1] < 0.9 * plain[0]
    assert found["straight"] == pytest.approx(plain, rel=1e-4)
    assert found["resumed"] == found["straight"]  # bitwise
    assert len(found["names"]) == 2 * 3 * 2
    assert all(name.endswith((".lora_A", ".lora_B")) for name in found["names"])
