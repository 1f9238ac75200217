"""Feed-forwards over products that were laid out: dense ones, and mixtures of experts.

An expert has as many rows as tokens chose it, which depends on the batch; its products' rows do not (`row_counts`).

Dimensions: N rows, D model width, F feed-forward width, E experts, K experts of a token, S slots sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.generation.expert_counts import Keep
from workloads.generation.matrices import Multiply
from workloads.model.gate import dispatch
from workloads.model.layers import FeedForward
from workloads.model.moe import MixtureOfExperts

FeedForwardFunction = Callable[[Tensor, bool, Keep | None], Tensor]
"""(N, D) of (N, D), whether the rows are tiles of prompts, and which choices of experts find a place; None: all."""


def lay_feed_forward(module: Any, products: Sequence[Multiply]) -> FeedForwardFunction:
    """The module's function; `products` are those of `matrices.groups_of`. What is neither dense nor a mixture is
    called as the module it is.
    """
    if type(module) is FeedForward:
        dense = _dense(*products)
        return lambda x_ND, tiled, keep: dense(x_ND, tiled)
    if isinstance(module, MixtureOfExperts):
        return _mixture(module, products)
    return lambda x_ND, tiled, keep: module(x_ND.unsqueeze(0)).squeeze(0)


def _dense(gate_up: Multiply, down: Multiply) -> Multiply:
    def compute(x_ND: Tensor, tiled: bool) -> Tensor:
        gate_NF, up_NF = gate_up(x_ND, tiled).chunk(2, -1)
        return down(F.silu(gate_NF).mul_(up_NF), tiled)

    return compute


def _mixture(module: MixtureOfExperts, products: Sequence[Multiply]) -> FeedForwardFunction:
    router, *rest = products
    experts = [_dense(*rest[at : at + 2]) for at in range(0, 2 * module.moe.experts, 2)]
    shared = _dense(*rest[2 * module.moe.experts :]) if module.shared is not None else None

    def compute(x_ND: Tensor, tiled: bool, keep: Keep | None) -> Tensor:
        choice = module.served_choice(router(x_ND.float(), tiled))
        kept_NK = None if keep is None else keep(choice.experts_NK)
        sent = dispatch(choice.experts_NK, 1, module.moe.experts, None, kept_NK)
        x_SD = x_ND.index_select(0, sent.choice_S // module.moe.chosen)
        parts = torch.split(x_SD, sent.sizes)
        out = [expert(x, tiled) for expert, x in zip(experts, parts, strict=True) if len(x)]
        out_SD = torch.cat([*out, x_ND.new_zeros(1, x_ND.shape[1])])  # the last: of a dropped choice
        weights_NK = choice.weights_NK.to(x_ND.dtype)
        out_ND = F.embedding_bag(sent.slot_NK, out_SD, mode="sum", per_sample_weights=weights_NK)
        return out_ND if shared is None else out_ND.add_(shared(x_ND, tiled))

    return compute
