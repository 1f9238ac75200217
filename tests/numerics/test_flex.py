"""flex_attention's mask, its log-sum-exp and how heads are put, against the steps; uncompiled, on the CPU. Its kernels
are for tests/gpu.
"""

from __future__ import annotations

import pytest
import torch

from workloads.model.attention import flex
from workloads.model.attention.layout import packing, split_heads
from workloads.model.attention.local import Band, local_attention


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("window", "block"), [(70, None), (None, 32), (None, None)])
def test_it_is_what_the_steps_give(
    window: int | None, block: int | None, kv_heads: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda function: function)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 301, heads, 16, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    documents = torch.tensor([[0] * 100 + [1] * 201, [0] * 290 + [1] * 11]) if packed else None
    band = Band(packing(301, documents, q.device), window, block)
    heads = split_heads(q, k, v)
    wanted, wanted_lse = local_attention(*heads, band)
    found, lse = flex.flex_local(*heads, band.flex_mask, len(q))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-6, atol=1e-6)  # flex keeps it in fp32


def test_it_is_for_gpus() -> None:
    assert not flex.flex_fits(torch.randn(1, 1, 8, 64))
