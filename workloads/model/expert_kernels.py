"""Which way of a mixture's products is the fastest on this machine (see `expert_runs`).

Dimensions: N tokens, D model width, F an expert's width, E experts, K experts of a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch

from escala.schema.moe import ExpertKernel
from workloads.model.experts import Experts
from workloads.model.gate import Dispatch, dispatch
from workloads.model.kernels import fastest

KERNELS: tuple[ExpertKernel, ...] = get_args(ExpertKernel)
SECONDS = 1.0


def measure(
    experts: int,
    d_model: int,
    d_ff: int,
    tokens: int,
    chosen: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = SECONDS,
) -> tuple[ExpertKernel, dict[str, float]]:
    """The fastest for a forward and backward pass of one layer, and the best seconds of each.

    The loads are those of a router without preference: each token's `chosen` of E experts by chance. Nothing is drawn
    from torch's own generator.

    Args:
        experts: that this rank has.
        d_ff: of one expert.
        tokens: of one micro-batch.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        layer = Experts(experts, d_model, d_ff, 1.0).to(device, dtype)
    x_ND = torch.randn(tokens, d_model, device=device, generator=generator).to(dtype).requires_grad_()
    score_NE = torch.rand(tokens, experts, device=device, generator=generator)
    sent = dispatch(score_NE.topk(chosen, dim=-1).indices, 1, experts, None)
    candidates: dict[str, Callable[[], None]] = {
        kernel: partial(_pass, layer, kernel, x_ND, chosen, sent) for kernel in KERNELS
    }
    alone = torch.get_num_threads() == 1 and device.type == "cpu"
    clock = (
        time.thread_time if alone else time.perf_counter
    )  # CPU time: a busy machine measures as a quiet one
    name, best = fastest(candidates, seconds, clock)
    return _named(name), best


def _pass(layer: Experts, kernel: ExpertKernel, x_ND: torch.Tensor, chosen: int, sent: Dispatch) -> None:
    layer.kernel = kernel
    weights_NK = x_ND.new_full((len(x_ND), chosen), 1 / chosen, requires_grad=True)
    layer(x_ND, weights_NK, sent).sum().backward()
    layer.zero_grad()
    x_ND.grad = None
    if x_ND.is_cuda:
        torch.cuda.synchronize()


def _named(name: str) -> ExpertKernel:
    return next(kernel for kernel in KERNELS if kernel == name)
