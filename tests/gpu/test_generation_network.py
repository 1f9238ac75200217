"""The generating network over its paged cache, in tiles and token by token, against the CPU's and the whole forward
pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.checks import assert_near_cpu, each_precision, model_of, tokens_of
from workloads.generation.network import Network, TokenSpan

pytestmark = pytest.mark.gpu
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "window": {"window_tokens": 21, "n_kv_heads": 4},
    "qk-norm": {"qk_norm": True, "tie_embeddings": False},
    "experts": {"moe": {"experts": 4, "chosen": 2, "every": 2, "shared_experts": 1}},
    "features": {"attention": "features"},
    "learned": {"attention": "features", "features": {"kind": "learned", "count": 64}},
    "hybrid": {"attention": "hybrid", "window_tokens": 32},
    "nystrom": {"attention": {"kind": "nystrom", "landmarks": 4}, "window_tokens": 32},
}
LENGTHS, BLOCK = (5, 64, 77), 16
each_model = pytest.mark.parametrize("name", MODELS)


def logits_step_by_step(name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Logits_NV after each prompt in tiles, and after ten more tokens of each, one at a time."""
    net = Network(model_of(device, dtype, **MODELS[name]))
    blocks = -(-(max(LENGTHS) + 10) // BLOCK)
    cache = net.decode_state(blocks * len(LENGTHS), BLOCK)
    texts = [tokens_of(512, n + 10, seed=n).tolist() for n in LENGTHS]
    tables = [list(range(blocks * i, blocks * (i + 1))) for i in range(len(LENGTHS))]

    def pieces(starts: list[int], ends: list[int]) -> list[TokenSpan]:
        each = zip(texts, tables, starts, ends, strict=True)
        return [TokenSpan(text[start:end], start, table) for text, table, start, end in each]

    with torch.inference_mode():
        found = [net.logits(net.forward(pieces([0] * len(LENGTHS), list(LENGTHS)), cache, tiled=True))]
        for more in range(10):
            at = [n + more for n in LENGTHS]
            one = pieces(at, [n + 1 for n in at])
            found.append(net.logits(net.forward(one, cache, tiled=False)))
    return torch.cat(found)[:, :512].clone()


@each_model
@each_precision
def test_the_same_as_on_the_cpu(name: str, device: torch.device, dtype: torch.dtype) -> None:
    assert_near_cpu(lambda *where: {"logits": logits_step_by_step(name, *where)}, device, dtype)


@each_model
def test_the_same_as_the_whole_forward_pass(name: str, device: torch.device) -> None:
    model = model_of(device, torch.float32, **MODELS[name]).eval()
    found = logits_step_by_step(name, device, torch.float32)
    for row, length in enumerate(LENGTHS):
        text = tokens_of(512, length + 10, seed=length).to(device)
        with torch.inference_mode():
            whole = model(text[None])[0, length - 1 :].float()
        torch.testing.assert_close(found[row :: len(LENGTHS)], whole, rtol=0, atol=5e-4)
