"""The experts' SwiGLU over tokens sorted by expert: one product a run of experts, near a dense layer's speed.

`torch._grouped_mm` takes 1.4 times as long on CPU. Everything between router and residual stream is one autograd
function: gathers in both directions (a scatter-add is several times slower, and on GPUs not deterministic), and of a
slot only its gate and up are kept for the backward pass.

Dimensions: N tokens, D model width, F an expert's width, E experts, K experts of a token, S slots sorted by expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from escala.schema.moe import ExpertKernel
from workloads.model.expert_runs import Run, lay_out
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
        kernel: how the products are made (see `expert_runs`); on the last bits of results it has a say.
    """

    def __init__(self, experts: int, d_model: int, d_ff: int, output_gain: float) -> None:
        super().__init__()
        self.is_share = False
        self.kernel: ExpertKernel = "slices"
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
        stacks, layout = (self.gate, self.up, self.down), lay_out(dispatch, self.kernel)
        return computed(
            x_ND, weights_NK, *stacks, layout.choice_P, layout.place_NK, layout.filled_P1, layout.runs
        )


def _padded(slots: int, like: Tensor, width: int) -> Tensor:
    """(S + 1, width), its last row zeros: the answer of the slot that a dropped choice points to."""
    out = like.new_empty(slots + 1, width)
    out[-1] = 0
    return out


def _of_runs(runs: Sequence[Run], *stacks: Tensor) -> Iterator[list[Tensor]]:
    """Of each run its part of the `stacks` of places (P, width), as (experts, rows, width)."""
    start = 0
    for run in runs:
        experts = run.last - run.first
        stop = start + experts * run.rows
        yield [stack[start:stop].view(experts, run.rows, stack.shape[1]) for stack in stacks]
        start = stop


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b of a run's experts."""
    if len(a) == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)


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
        filled_S1: Tensor | None,
        runs: tuple[Run, ...],
    ) -> Tensor:
        slots, width = len(choice_S), gate_EFD.shape[1]
        x_SD = x_ND.index_select(0, choice_S // slot_NK.shape[1])
        gate_SF, up_SF = x_ND.new_empty(slots, width), x_ND.new_empty(slots, width)
        out_SD = _padded(slots, x_ND, x_ND.shape[1])
        for run, (x, gate, up, out) in zip(
            runs, _of_runs(runs, x_SD, gate_SF, up_SF, out_SD[:-1]), strict=True
        ):
            to_gate, to_up, to_down = (
                stack[run.first : run.last].mT for stack in (gate_EFD, up_EFD, down_EDF)
            )
            _multiply(x, to_gate, gate)
            _multiply(x, to_up, up)
            _multiply(F.silu(gate).mul_(up), to_down, out)
        ctx.save_for_backward(
            x_ND, weights_NK, gate_EFD, up_EFD, down_EDF, choice_S, slot_NK, filled_S1, gate_SF, up_SF
        )
        ctx.runs = runs
        return F.embedding_bag(slot_NK, out_SD, mode="sum", per_sample_weights=weights_NK.to(x_ND.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, *stacks, choice_S, slot_NK, filled_S1, gate_SF, up_SF = ctx.saved_tensors
        slots, token_S = len(choice_S), choice_S // slot_NK.shape[1]
        weight_S1 = weights_NK.reshape(-1, 1).index_select(0, choice_S).to(x_ND.dtype)
        if filled_S1 is not None:
            weight_S1 *= filled_S1  # padding adds nothing to a matrix's gradient
        x_SD, grad_SD = x_ND.index_select(0, token_S), grad_ND.index_select(0, token_S)
        grad_x_SD = _padded(slots, x_ND, x_ND.shape[1])
        grad_weight_S1 = _padded(slots, weights_NK, 1)
        grads = [torch.empty_like(stack) for stack in stacks]
        slices = (x_SD, grad_SD, gate_SF, up_SF, weight_S1, grad_x_SD[:-1], grad_weight_S1[:-1])
        for run, part in zip(ctx.runs, _of_runs(ctx.runs, *slices), strict=True):
            _run_backward(*part, *(stack[run.first : run.last] for stack in (*stacks, *grads)))
        grad_x_ND = F.embedding_bag(slot_NK, grad_x_SD, mode="sum")
        grad_weights_NK = grad_weight_S1[:, 0][slot_NK]
        return grad_x_ND, grad_weights_NK, *grads, None, None, None, None


def _run_backward(
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
    """A run's places: write the gradients of its inputs x, of its choices' weights, of its experts' three matrices.
    Without slots the products write zeros.
    """
    silu = F.silu(gate)
    hidden = silu * up
    back = grad @ to_down  # of the hidden state, before the choice's weight
    grad_weight.copy_(torch.linalg.vecdot(back, hidden).unsqueeze(-1))
    _multiply(grad.mT, hidden.mul_(weight), grad_to_down)
    back.mul_(weight)
    grad_up = silu.mul_(back)
    grad_gate = torch.ops.aten.silu_backward(back.mul_(up), gate)
    _multiply(grad_gate.mT, x, grad_to_gate)
    _multiply(grad_up.mT, x, grad_to_up)
    _multiply(grad_gate, to_gate, grad_x)
    grad_x.baddbmm_(grad_up, to_up)
