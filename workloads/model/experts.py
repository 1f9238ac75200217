"""The experts' SwiGLU over tokens sorted by expert: one product a slice, at a dense layer's speed.

`torch._grouped_mm` is no faster on CPU. Everything between router and residual stream is one autograd function:
gathers in both directions (a scatter-add is several times slower, and on GPUs not deterministic), and of a slot only
its gate and up are kept for the backward pass.

Dimensions: N tokens, D model width, F an expert's width, E experts, K experts of a token, S slots sorted by expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from workloads.model.gate import Dispatch

STACKS = ("gate", "up", "down")


class Experts(nn.Module):
    """E feed-forwards down(silu(gate(x)) * up(x)), their weights stacked in three parameters.

    Stacked, because which experts get tokens depends on the data, and which modules run must not: under ZeRO-3 a rank
    that skips an expert's module leaves the others waiting in its gather forever. Here all ranks gather the same three
    parameters, and an expert without tokens has a gradient of zeros; so there is nothing to mark by
    `deepspeed.utils.set_z3_leaf_modules`. Nor does a slice of a stack cost a gradient of the whole stack: the backward
    pass writes each expert's part in place.

    Attributes:
        is_share: these are a rank's E/P of the model's E (see `exchange`).
    """

    def __init__(self, experts: int, d_model: int, d_ff: int, output_gain: float) -> None:
        super().__init__()
        self.is_share = False
        self.gate = nn.Parameter(torch.empty(experts, d_ff, d_model))
        self.up = nn.Parameter(torch.empty(experts, d_ff, d_model))
        self.down = nn.Parameter(torch.empty(experts, d_model, d_ff))
        for weight, gain in ((self.gate, 1.0), (self.up, 1.0), (self.down, output_gain)):
            nn.init.normal_(weight, std=gain / math.sqrt(weight.shape[-1]))  # as layers.Linear

    def keep_share(self, rank: int, ranks: int) -> None:
        """Of the E experts keep the rank's E/P, in order, and free the rest."""
        for stack in STACKS:
            whole = getattr(self, stack)
            mine = whole.detach().chunk(ranks)[rank].clone()
            setattr(self, stack, nn.Parameter(mine, whole.requires_grad))
        self.is_share = True

    def forward(self, x_ND: Tensor, weights_NK: Tensor, dispatch: Dispatch) -> Tensor:
        """sum_k weights_NK x expert(x_ND), (N, D); a dropped choice adds nothing."""
        computed: Callable[..., Tensor] = _Experts.apply
        return computed(
            x_ND,
            weights_NK,
            self.gate,
            self.up,
            self.down,
            dispatch.choice_S,
            dispatch.slot_NK,
            dispatch.sizes,
        )


def _padded(slots: int, like: Tensor, width: int) -> Tensor:
    """(S + 1, width), its last row zeros: the answer of the slot that a dropped choice points to."""
    out = like.new_empty(slots + 1, width)
    out[-1] = 0
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        choice_S: Tensor,
        slot_NK: Tensor,
        sizes: list[int],
    ) -> Tensor:
        slots, width = len(choice_S), gate_EFD.shape[1]
        x_SD = x_ND.index_select(0, choice_S // slot_NK.shape[1])
        gate_SF, up_SF = x_ND.new_empty(slots, width), x_ND.new_empty(slots, width)
        out_SD = _padded(slots, x_ND, x_ND.shape[1])
        parts = (torch.split(part, sizes) for part in (x_SD, gate_SF, up_SF, out_SD[:-1]))
        for x, gate, up, out, *weights in zip(*parts, gate_EFD, up_EFD, down_EDF, strict=True):
            to_gate, to_up, to_down = weights
            torch.mm(x, to_gate.t(), out=gate)
            torch.mm(x, to_up.t(), out=up)
            torch.mm(F.silu(gate).mul_(up), to_down.t(), out=out)
        ctx.save_for_backward(x_ND, weights_NK, gate_EFD, up_EFD, down_EDF, choice_S, slot_NK, gate_SF, up_SF)
        ctx.sizes = sizes
        return F.embedding_bag(slot_NK, out_SD, mode="sum", per_sample_weights=weights_NK.to(x_ND.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, gate_EFD, up_EFD, down_EDF, choice_S, slot_NK, gate_SF, up_SF = ctx.saved_tensors
        slots, token_S = len(choice_S), choice_S // slot_NK.shape[1]
        weight_S1 = weights_NK.reshape(-1, 1).index_select(0, choice_S).to(x_ND.dtype)
        x_SD, grad_SD = x_ND.index_select(0, token_S), grad_ND.index_select(0, token_S)
        grad_x_SD = _padded(slots, x_ND, x_ND.shape[1])
        grad_weight_S1 = _padded(slots, weights_NK, 1)
        stacks = (gate_EFD, up_EFD, down_EDF)
        grads = [torch.empty_like(stack) for stack in stacks]
        slices = (x_SD, grad_SD, gate_SF, up_SF, weight_S1, grad_x_SD[:-1], grad_weight_S1[:-1])
        for part in zip(*(torch.split(s, ctx.sizes) for s in slices), *stacks, *grads, strict=True):
            _expert_backward(*part)
        grad_x_ND = F.embedding_bag(slot_NK, grad_x_SD, mode="sum")
        grad_weights_NK = grad_weight_S1[:, 0][slot_NK]
        return grad_x_ND, grad_weights_NK, *grads, None, None, None


def _expert_backward(
    x: Tensor,
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    to_gate: Tensor,
    to_up: Tensor,
    to_down: Tensor,
    grad_to_gate: Tensor,
    grad_to_up: Tensor,
    grad_to_down: Tensor,
) -> None:
    """One expert's slots: write the gradients of its inputs x, of its choices' weights, of its three matrices. Without
    slots the products write zeros.
    """
    silu = F.silu(gate)
    hidden = silu * up
    back = grad @ to_down  # of the hidden state, before the choice's weight
    grad_weight.copy_(torch.linalg.vecdot(back, hidden).unsqueeze(-1))
    torch.mm(grad.t(), hidden.mul_(weight), out=grad_to_down)
    back.mul_(weight)
    grad_up = silu.mul_(back)
    grad_gate = torch.ops.aten.silu_backward(back.mul_(up), gate)
    torch.mm(grad_gate.t(), x, out=grad_to_gate)
    torch.mm(grad_up.t(), x, out=grad_to_up)
    torch.mm(grad_gate, to_gate, out=grad_x)
    grad_x.addmm_(grad_up, to_up)
