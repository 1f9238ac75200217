"""Leaf layers: what each chooses by its device, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.checks import assert_near_cpu, each_precision, normal, rounded, tokens_of
from workloads.model.layers import Embedding, FeedForward, Linear, RMSNorm
from workloads.model.rope import RotaryTable, rotate

pytestmark = pytest.mark.gpu
ROWS, WIDTH = 300, 192
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Linear(WIDTH, 320),
    "norm": lambda: RMSNorm(WIDTH, 1e-6),
    "feed_forward": lambda: FeedForward(WIDTH, 512, 0.5),
}


@each_precision
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_gradients(name: str, device: torch.device, dtype: torch.dtype) -> None:
    def work(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layer = LAYERS[name]()
        for number, weight in enumerate(layer.parameters()):
            if weight.ndim == 1:
                weight.data.add_(normal(len(weight), seed=number), alpha=0.3)
            weight.data = weight.data.bfloat16().to(device, dtype)
        x = rounded(normal(ROWS, WIDTH), device, dtype)
        out = layer(x)
        out.backward(rounded(normal(*out.shape, seed=1), device, dtype).detach())
        return {"out": out.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}

    assert_near_cpu(work, device, dtype)


@each_precision
def test_rotation(device: torch.device, dtype: torch.dtype) -> None:
    """Positions up to 4,000: angles must be made in fp32."""

    def work(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        x = rounded(normal(2, 200, 4, 64), device, dtype)
        positions = (torch.arange(200) * 20).expand(2, -1).to(device)
        out = rotate(x, *RotaryTable(64, 10_000.0)(positions, like=x))
        out.backward(rounded(normal(*out.shape, seed=1), device, dtype).detach())
        return {"out": out.detach(), "x": x.grad}

    assert_near_cpu(work, device, dtype)


@each_precision
def test_a_tied_embedding(device: torch.device, dtype: torch.dtype) -> None:
    """Looked up and projected onto: one weight gets both gradients."""

    def work(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(0)
        table = Embedding(1000, WIDTH)
        table.weight.data = table.weight.data.bfloat16().to(device, dtype)
        ids = tokens_of(1000, 2, ROWS).to(device)
        logits = table(hidden=table(ids))
        logits.backward(rounded(normal(*logits.shape, seed=1), device, dtype).detach())
        return {"logits": logits.detach(), "weight": table.weight.grad}

    assert_near_cpu(work, device, dtype)
