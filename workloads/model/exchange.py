"""Expert parallelism: each rank has E/P of the experts and computes them for the tokens of all ranks, sent there and
back by all-to-all (Lepikhin et al. 2021, section 3.2).

What is split is the work and the memory: an expert's weights, gradient and optimiser state are on one rank alone
(training/own_experts.py). The gradients of all ranks' tokens come to it by the same way, so nothing is reduced.
Slots are filled on the rank that a token comes from: what is dropped is the same as without.

Dimensions: N tokens, D model width, E experts, K choices of a token, S slots sorted by expert, P ranks, R rows that
a rank receives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from workloads.model.experts import Experts
from workloads.model.gate import Dispatch, dispatch


class Exchange:
    """The ranks that share a mixture's experts.

    Attributes:
        sent_bytes: what this rank has sent to the others.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.ranks, self.sent_bytes = dist.get_rank(group), dist.get_world_size(group), 0
        self._group = group

    def swap(self, rows: Tensor, in_P: list[int], out_P: list[int]) -> Tensor:
        """Send the next `out_P` rows to each rank, and receive `in_P` of each. A collective call."""
        received = rows.new_empty(sum(in_P), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), in_P, out_P, group=self._group)
        self.sent_bytes += (len(rows) - out_P[self.rank]) * rows.shape[1] * rows.element_size()
        return received


def compute_elsewhere(
    experts: Experts, x_ND: Tensor, weights_NK: Tensor, sent: Dispatch, exchange: Exchange
) -> Tensor:
    """The answer of all E experts, each one's slots computed by its rank, whose `experts` are E/P, in order. A
    collective call: all ranks of `exchange` make equally many, also one without tokens.
    """
    mine, one_P = len(sent.sizes) // exchange.ranks, [1] * exchange.ranks
    out_PE = torch.tensor(sent.sizes, device=x_ND.device).view(exchange.ranks, mine)
    in_PE = exchange.swap(out_PE, one_P, one_P)
    out_P, in_P = out_PE.sum(1).tolist(), in_PE.sum(1).tolist()
    x_SD = x_ND.index_select(0, sent.choice_S // weights_NK.shape[1])
    x_RD = _swap(x_SD, in_P, out_P, exchange)
    expert_R = (
        torch.arange(mine, device=x_ND.device).repeat(exchange.ranks).repeat_interleave(in_PE.flatten())
    )
    here = dispatch(expert_R[:, None], 1, mine, None)
    y_RD = experts(x_RD, weights_NK.new_ones(len(x_RD), 1), here)
    y_SD = _swap(y_RD, out_P, in_P, exchange)
    padded = torch.cat([y_SD, y_SD.new_zeros(1, y_SD.shape[1])])
    return (padded[sent.slot_NK] * weights_NK.to(y_SD.dtype).unsqueeze(-1)).sum(dim=1)


class _Swap(torch.autograd.Function):
    """`Exchange.swap`; the gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, in_P: list[int], out_P: list[int], exchange: Exchange) -> Tensor:
        ctx.way_back, ctx.exchange = (out_P, in_P), exchange
        return exchange.swap(rows, in_P, out_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.exchange.swap(grad, *ctx.way_back), None, None, None


_swap: Callable[[Tensor, list[int], list[int], Exchange], Tensor] = _Swap.apply
