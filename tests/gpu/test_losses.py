"""Losses, advantages and collectives on the device, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from tests.gpu.checks import CPU, assert_near_cpu, each_precision, normal, rounded, tokens_of
from workloads.alignment import advantages, losses
from workloads.alignment.kl import kl_loss
from workloads.alignment.masked import moments
from workloads.training.loss import log_probabilities, token_loss

pytestmark = pytest.mark.gpu
ROWS, CONTEXT, VOCABULARY = 6, 40, 1536
Loss = Callable[[Tensor, torch.device], Tensor]


def mask(device: torch.device) -> Tensor:
    """With holes, and a row without any."""
    keep = normal(ROWS, CONTEXT, seed=5) > -0.5
    keep[2] = False
    return keep.to(device)


def targets(device: torch.device) -> Tensor:
    return tokens_of(VOCABULARY, ROWS, CONTEXT, seed=6).to(device)


def column(seed: int, device: torch.device) -> Tensor:
    """Of a rollout: log-probabilities, values or advantages, in fp32."""
    return normal(ROWS, CONTEXT, seed=seed).to(device)


OF_LOGITS: dict[str, Loss] = {
    "cross-entropy": lambda x, at: token_loss(x, targets(at), mask(at))[0],
    "log-probabilities": lambda x, at: (
        log_probabilities(x.flatten(0, 1), targets(at).flatten()) * column(7, at).flatten()
    ).sum(),
    "entropy": lambda x, at: losses.entropy(x, mask(at)),
}
OF_COLUMNS: dict[str, Loss] = {
    **{
        f"policy-{mode}": lambda x, at, mode=mode: losses.policy_loss(
            x, column(1, at) * 0.2 + x.detach(), column(2, at), mask(at), 0.2, 0.28, 3.0, mode
        )
        for mode in ("token", "sequence_mean", "gspo")
    },
    "value": lambda x, at: losses.value_loss(x, column(1, at), column(2, at), mask(at), 0.2),
    "kl-k2": lambda x, at: kl_loss(x, column(1, at), mask(at), "k2"),
    "kl-k3": lambda x, at: kl_loss(x, column(1, at), mask(at), "k3"),
    "bradley-terry": lambda x, at: losses.bradley_terry(x[:, 0], x[:, 1], 0.3),
    "dpo": lambda x, at: losses.dpo_loss(x[:, 0], x[:, 1], x[:, 2].detach(), x[:, 3].detach(), 0.1),
}


def value_and_gradient(loss: Loss, shape: tuple[int, ...]) -> Callable[..., Mapping[str, Tensor]]:
    def work(device: torch.device, dtype: torch.dtype) -> Mapping[str, Tensor]:
        x = rounded(normal(*shape), device, dtype)
        value = loss(x, device)
        value.backward()
        return {"value": value.detach(), "gradient": x.grad}

    return work


@each_precision
@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_loss_of_logits(name: str, device: torch.device, dtype: torch.dtype) -> None:
    shape = (ROWS, CONTEXT, VOCABULARY)
    assert_near_cpu(value_and_gradient(OF_LOGITS[name], shape), device, dtype)


@each_precision
@pytest.mark.parametrize("name", OF_COLUMNS)
def test_a_loss_of_columns(name: str, device: torch.device, dtype: torch.dtype) -> None:
    assert_near_cpu(value_and_gradient(OF_COLUMNS[name], (ROWS, CONTEXT)), device, dtype)


def test_advantages(device: torch.device) -> None:
    def work(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        rewards, values, keep = column(1, device), column(2, device), mask(device)
        found, returns = advantages.gae(rewards, values, keep, 0.99, 0.95)
        groups = torch.tensor([0, 0, 1, 1, 2, 2], device=device)
        return {
            "gae": found,
            "returns": returns,
            "whitened": advantages.whiten(found, keep),
            "grpo": advantages.grpo(rewards.sum(-1), groups),
        }

    assert_near_cpu(work, device, torch.float32)


def test_ranks_talk_of_tensors_on_both_devices(device: torch.device, alone: None) -> None:
    """PPO's columns are on the CPU while its gradients are on the GPU: both must have a backend."""
    for at in (CPU, device):
        count, mean, squares = moments(column(1, at), mask(at))
        wanted = column(1, CPU)[mask(CPU)].double()
        assert int(count) == len(wanted)
        assert float(mean) == pytest.approx(float(wanted.mean()))
        assert float(squares) == pytest.approx(float((wanted - wanted.mean()).square().sum()))
