"""A training step: forward, backward, clipping, AdamW; and a few of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from escala.schema import TrainingConfig
from tests.gpu.checks import CPU, assert_near_cpu, each_precision, model_of, rms, tokens_of
from tests.gpu.figures import Figures
from tests.gpu.training import PlainEngine, gradient
from workloads.training.meter import choose_matmul_precision

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("alone")]
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "checkpointed": {"qk_norm": True, "window_tokens": 40},
    "experts": {"moe": {"experts": 4, "chosen": 2, "capacity_factor": 1.0, "z_loss_weight": 0.01}},
}
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def engine_of(name: str, device: torch.device, dtype: torch.dtype) -> PlainEngine:
    training = TrainingConfig.model_validate(
        {"precision": PRECISIONS[dtype], "activation_checkpointing": name == "checkpointed"}
    )
    return PlainEngine(model_of(device, dtype, **MODELS[name]).train(), training)


@each_precision
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """In two micro-batches."""

    def work(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        engine = engine_of(name, device, dtype)
        loss = gradient(engine, tokens_of(512, 4, 97).to(device), micro_steps=2)
        return {"loss": loss, **{n: p.grad for n, p in engine.module.named_parameters()}}

    assert_near_cpu(work, device, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_the_update(name: str, device: torch.device) -> None:
    """AdamW's first update is nearly the gradient's sign: an element whose gradient is next to nothing may go either
    way, so the updates are compared as a whole.
    """
    updates = []
    for at in (CPU, device):
        engine = engine_of(name, at, torch.float32)
        before = [p.detach().clone() for p in engine.module.parameters()]
        gradient(engine, tokens_of(512, 4, 97).to(at))
        norm = engine.update(1e-3)
        pairs = zip(engine.module.parameters(), before, strict=True)
        updates.append((norm, torch.cat([(p.detach() - old).flatten().cpu() for p, old in pairs])))
    (wanted_norm, wanted), (norm, found) = updates
    assert norm == pytest.approx(wanted_norm, rel=1e-4)
    assert rms(found - wanted) <= 0.02 * rms(wanted)


@each_precision
@pytest.mark.parametrize("name", MODELS)
def test_losses_fall_alike(name: str, device: torch.device, dtype: torch.dtype, figures: Figures) -> None:
    """Twenty steps on one batch."""
    curves = []
    for at in (CPU, device):
        engine = engine_of(name, at, dtype)
        tokens = tokens_of(512, 4, 65).to(at)
        losses = []
        for step in range(20):
            losses.append(float(gradient(engine, tokens)))
            engine.update(1e-3 * min(1.0, (step + 1) / 5))
        curves.append(torch.tensor(losses))
    wanted, found = curves
    assert float(wanted[-1]) < float(wanted[0]) - 1.0
    worst = float((found - wanted).abs().max())
    assert worst <= (0.02 if dtype == torch.float32 else 0.1)
    name = f"20 steps, {name}, {PRECISIONS[dtype]}: loss at the end, nats"
    figures.add(name, f"{float(found[-1]):.4f}", f"CPU {float(wanted[-1]):.4f}, at most {worst:.1e} apart")


def test_fp32_products_keep_their_precision(device: torch.device, figures: Figures) -> None:
    """The start-up check must not choose TF32, whose errors are a thousand times as large."""
    choice = choose_matmul_precision("auto", device)
    figures.add("fp32 products", str(choice), "")
    a, b = (torch.randn(512, 512, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    exact = a.double() @ b.double()
    found = (a.to(device) @ b.to(device)).cpu()
    assert float((found - exact).abs().max()) <= FP32_PRODUCT * rms(exact)


FP32_PRODUCT = 2e-5  # 512 terms in fp32; TF32 has 2e-3
