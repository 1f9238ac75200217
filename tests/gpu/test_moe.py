"""Mixtures of experts: routing, capacity, the experts' own backward pass, the losses that keep them even."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from escala.schema import ModelConfig
from tests.gpu.checks import CPU, assert_near_cpu, each_precision, normal, rounded
from workloads.model.experts import Experts
from workloads.model.gate import dispatch
from workloads.model.moe import MixtureOfExperts

pytestmark = pytest.mark.gpu
WIDTH, ROWS, CONTEXT = 128, 4, 64
EVEN = {"kind": "symmetric_kl", "weight": 0.05}
MIXTURES: dict[str, dict[str, Any]] = {
    "top-2": {},
    "dropping": {"capacity_factor": 0.6, "balance": EVEN, "hinge_weight": 0.1},
    "top-1-shared": {"chosen": 1, "shared_experts": 1, "z_loss_weight": 0.01},
    "straight-through": {"estimator": "straight_through", "margin": 0.5, "margin_weight": 0.1},
    "soft": {"estimator": "soft_to_hard", "balance": {"kind": "quadratic"}},
}


@each_precision
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_and_its_gradients(name: str, device: torch.device, dtype: torch.dtype) -> None:
    def work(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        section = {"experts": 8, "d_ff": 96, **MIXTURES[name]}
        config = ModelConfig.model_validate({"d_model": WIDTH, "moe": section})
        assert config.moe is not None
        torch.manual_seed(0)
        mixture = MixtureOfExperts(config, config.moe, 0.5)
        for weight in mixture.parameters():
            weight.data = weight.data.bfloat16().to(device, dtype)
        x = rounded(normal(ROWS, CONTEXT, WIDTH), device, dtype)
        out = mixture(x)
        assert mixture.routing is not None
        losses = sum(mixture.routing.losses.values(), out.new_zeros(()))
        grad = rounded(normal(*out.shape, seed=1), device, dtype).detach()
        torch.autograd.backward([out, losses], [grad, torch.ones_like(losses)])
        found = {"out": out.detach(), "x": x.grad, "load": mixture.routing.load_E.float()}
        return found | {n: p.grad for n, p in mixture.named_parameters()}

    assert_near_cpu(work, device, dtype)


@each_precision
def test_experts_without_tokens(device: torch.device, dtype: torch.dtype) -> None:
    """Their products are of no rows; their gradients are zeros, not what was in memory."""

    def work(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(0)
        experts = Experts(6, WIDTH, 96, 0.5)
        for weight in experts.parameters():
            weight.data = weight.data.bfloat16().to(device, dtype)
        x = rounded(normal(50, WIDTH), device, dtype)
        weights = rounded(normal(50, 2, seed=1).sigmoid(), device, torch.float32)
        chosen = torch.tensor([[1, 4]] * 20 + [[4, 1]] * 30, device=device)
        out = experts(x, weights, dispatch(chosen, 2, 6, limit=None))
        out.backward(rounded(normal(*out.shape, seed=2), device, dtype).detach())
        found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
        return found | {n: p.grad for n, p in experts.named_parameters()}

    assert_near_cpu(work, device, dtype)
    for name, grad in work(device, dtype).items():
        if name in ("gate", "up", "down"):
            assert not grad[[0, 2, 3, 5]].any(), name


@pytest.mark.parametrize("limit", [None, 9, 40])
def test_slots_are_dealt_alike(limit: int | None, device: torch.device) -> None:
    """Sorting is stable on both: the same tokens get slots, in the same order."""
    chosen = torch.randint(8, (ROWS * CONTEXT, 2), generator=torch.Generator().manual_seed(0))
    wanted, found = (dispatch(chosen.to(at), ROWS, 8, limit) for at in (CPU, device))
    assert found.sizes == wanted.sizes
    for name in ("choice_S", "slot_NK", "load_E"):
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name
