"""How near a device's result must be to the CPU's, and the models that the tests share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from escala.schema import ModelConfig
from workloads.model.transformer import Transformer

CPU = torch.device("cpu")
# Of the result's root mean square, the largest error of an element. fp32 sums of another order are off by 1e-6 to
# 1e-5; TF32, which nobody asked for, by 1e-3.
FP32_ERROR = 1e-4
# bf16 is as exact on the device as on the CPU, both against fp32: root mean squares of the errors.
BF16_RATIO, BF16_SLACK = 2.0, 0.01

Work = Callable[[torch.device, torch.dtype], Mapping[str, Tensor]]
each_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())


def assert_near_cpu(work: Work, device: torch.device, dtype: torch.dtype) -> None:
    """`work` on the device in `dtype` against itself on the CPU in fp32; the numbers that it starts from must be bf16's
    in both (`rounded`).
    """
    wanted, found = work(CPU, torch.float32), work(device, dtype)
    own = work(CPU, dtype) if dtype == torch.bfloat16 else found
    assert found.keys() == wanted.keys()
    for name, reference in wanted.items():
        x, size = found[name].cpu().double(), rms(reference)
        assert x.shape == reference.shape, name
        error = x - reference.double()
        if dtype == torch.float32:
            worst = float(error.abs().max())
            assert worst <= FP32_ERROR * size, f"{name}: {worst:.2e} of {size:.2e}"
        else:
            most = BF16_RATIO * rms(own[name].double() - reference.double()) + BF16_SLACK * size
            assert rms(error) <= most, f"{name}: {rms(error):.2e}, at most {most:.2e} of {size:.2e}"


def rounded(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers that bf16 holds, as a leaf with a gradient."""
    return x.bfloat16().to(device, dtype).detach().requires_grad_()


def normal(*shape: int, seed: int = 0) -> Tensor:
    """From the standard normal distribution, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(vocabulary: int, *shape: int, seed: int = 0) -> Tensor:
    """Random token ids, on the CPU."""
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def model_of(device: torch.device, dtype: torch.dtype, **changes: Any) -> Transformer:
    """The same weights on every device and in every dtype; a few layers."""
    shape = {
        "vocab_size": 512,
        "n_layers": 3,
        "d_model": 256,
        "n_heads": 4,
        "n_kv_heads": 2,
        "max_context_tokens": 256,
    }
    torch.manual_seed(0)
    model = Transformer(ModelConfig.model_validate({**shape, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    return model.to(device, dtype)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one call in a row of `repeats`, after a first one."""
    work()
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(device)
    return (time.perf_counter() - start) / repeats


def wait(device: torch.device) -> None:
    """For all that the device was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
