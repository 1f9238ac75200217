"""Expert parallelism: each rank has E/P of the experts and computes them for the tokens of all ranks, sent there and
back by all-to-all (Lepikhin et al. 2021, section 3.2).

What is split is the work and the memory: an expert's weights, gradient and optimiser state are on one rank alone
(training/own_experts.py). The gradients of all ranks' tokens come to it by the same way, so nothing is reduced.
Slots are filled on the rank that a token comes from: what is dropped is the same as without.

Dimensions: N tokens, D model width, E experts, K choices of a token, S slots sorted by expert, P ranks, R rows that
a rank receives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from workloads.model.experts import Experts
from workloads.model.gate import Dispatch, dispatch


def compute_elsewhere(
    experts: Experts, x_ND: Tensor, weights_NK: Tensor, sent: Dispatch, group: dist.ProcessGroup
) -> Tensor:
    """The answer of all E experts, each one's slots computed by its rank, whose `experts` are E/P, in order. A
    collective call: all ranks of `group` make equally many, also one without tokens.
    """
    ranks, count = dist.get_world_size(group), len(sent.sizes)
    mine = count // ranks
    out_PE = torch.tensor(sent.sizes, device=x_ND.device).view(ranks, mine)
    in_PE = torch.empty_like(out_PE)
    dist.all_to_all_single(in_PE, out_PE, group=group)
    out_P, in_P = out_PE.sum(1).tolist(), in_PE.sum(1).tolist()
    x_SD = x_ND.index_select(0, sent.choice_S // weights_NK.shape[1])
    x_RD = _Exchange.apply(x_SD, in_P, out_P, group)
    expert_R = torch.arange(mine, device=x_ND.device).repeat(ranks).repeat_interleave(in_PE.flatten())
    here = dispatch(expert_R[:, None], 1, mine, None)
    y_RD = experts(x_RD, weights_NK.new_ones(len(x_RD), 1), here)
    y_SD = _Exchange.apply(y_RD, out_P, in_P, group)
    padded = torch.cat([y_SD, y_SD.new_zeros(1, y_SD.shape[1])])
    return (padded[sent.slot_NK] * weights_NK.to(y_SD.dtype).unsqueeze(-1)).sum(dim=1)


class _Exchange(torch.autograd.Function):
    """Rows to and from each rank; the gradients go the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, in_P: list[int], out_P: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.splits, ctx.group = (in_P, out_P), group
        received = rows.new_empty(sum(in_P), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), in_P, out_P, group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        in_P, out_P = ctx.splits
        returned = grad.new_empty(sum(out_P), grad.shape[1])
        dist.all_to_all_single(returned, grad.contiguous(), out_P, in_P, group=ctx.group)
        return returned, None, None, None
