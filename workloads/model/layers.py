"""The transformer's leaf layers. Each draws its own weights in its constructor, so it works on meta and
under DeepSpeed's `zero.Init`, which takes a module's weights away as soon as it is constructed.

Dimensions: B batch, T context, D model width, F feed-forward width, V vocabulary; `...` any leading ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """A product without bias; weights from a normal distribution of variance gain^2 / inputs (LeCun et al. 1998,
    section 4.6), which keeps the signal's size at every width. GPT-2's 0.02 for all widths fits d = 768 to 2048; at
    d = 48 it leaves runs on a plateau for a random while: 0.2 nats between seeds, against 0.02.
    """

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        self.init_std = gain / math.sqrt(
            inputs
        )  # before nn.Linear's constructor, which calls reset_parameters
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weights again from torch's global generator."""
        nn.init.normal_(self.weight, std=self.init_std)


class Embedding(nn.Module):
    """The table of token vectors. Given tokens it looks them up; given `hidden` it projects onto them.

    Tied embeddings call this one module twice, so ZeRO-3's hooks gather the table for both uses.
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(self, tokens_BT: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """Vectors (B, T, D) of tokens (B, T), or logits (..., V) of hidden states (..., D)."""
        if hidden is not None:
            return F.linear(hidden, self.weight)
        if tokens_BT is None:
            raise TypeError("Embedding needs tokens_BT or hidden")
        return F.embedding(tokens_BT, self.weight)


class _RMSNormCPU(torch.autograd.Function):
    """RMSNorm with its gradient by hand: a third of F.rms_norm's time on CPU, where none is fused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(torch.linalg.vecdot(x32, x32).unsqueeze(-1) / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        unit, grad = x.float() * scale, grad.float()
        grad_weight = torch.linalg.vecdot(grad.reshape(-1, width), unit.reshape(-1, width), dim=0)
        grad_unit = grad * weight
        along = torch.linalg.vecdot(grad_unit, unit).unsqueeze(-1) / width
        grad_x = grad_unit.addcmul_(unit, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


_rms_norm_cpu: Callable[[Tensor, Tensor, float], Tensor] = _RMSNormCPU.apply


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019); reduced in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype as x (..., width)."""
        if x.device.type == "cpu":
            return _rms_norm_cpu(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Backward recomputes silu: half the time on CPU and one activation less in memory."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


_swiglu: Callable[[Tensor, Tensor], Tensor] = _SwiGLU.apply


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, d_model: int, d_ff: int, output_gain: float) -> None:
        super().__init__()
        self.gate = Linear(d_model, d_ff)
        self.up = Linear(d_model, d_ff)
        self.down = Linear(d_ff, d_model, output_gain)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        out: Tensor = self.down(_swiglu(self.gate(x_BTD), self.up(x_BTD)))
        return out
