"""Which share of exact attention's mass lies in a window of the last keys: what a pilot measures (docs/theory A.8).

Dimensions: B batch, T context, H query heads, G key/value heads, E = H / G, N = B * G, S head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workloads.model.attention.layout import of_heads, packing, split_heads
from workloads.model.attention.local import Band, scores
from workloads.model.attention.registry import AttentionModule


@torch.no_grad()
def mass_in_window(
    q_BTHS: Tensor, k_BTGS: Tensor, window_tokens: int, documents_BT: Tensor | None = None
) -> Tensor:
    """[sum, count] in fp64 over batch, heads and queries that see more than `window_tokens` keys: of the softmax
    weights of each query's last `window_tokens` keys, itself included. Exact; a query that sees no more has all of its
    mass there, whatever the model does, and does not count. Time grows with T^2, memory with T.
    """
    q_NETS, k_NTS, _ = split_heads(q_BTHS, k_BTGS, k_BTGS)
    packed = packing(q_BTHS.shape[1], documents_BT, q_BTHS.device)
    every, near = Band(packed), Band(packed, window_tokens)
    sees_more_NT = of_heads(packed.seen_before_BT >= window_tokens, len(k_NTS))
    found = q_BTHS.new_zeros(2, dtype=torch.float64)
    for queries, keys in every.steps():
        counts = sees_more_NT[:, None, queries]
        logits = scores(q_NETS, k_NTS, queries, keys)
        logits.masked_fill_(every.unseen(queries, keys, len(k_NTS)), float("-inf"))
        lse_NET = logits.logsumexp(-1)
        logits.masked_fill_(near.unseen(queries, keys, len(k_NTS)), float("-inf"))
        share_NET = (logits.logsumexp(-1) - lse_NET).exp() * counts
        found += torch.stack((share_NET.sum(dtype=torch.float64), counts.sum() * share_NET.shape[1]))
    return found


@contextmanager
def measured_mass(model: nn.Module | None, window_tokens: int | None) -> Iterator[Tensor]:
    """While it is open, every forward pass of the model's attention adds its `mass_in_window` to what is yielded, on
    the CPU; without a model or a window nothing does.
    """
    total = torch.zeros(2, dtype=torch.float64)

    def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        total.add_(mass_in_window(inputs[0], inputs[1], window_tokens or 1).cpu())

    modules = () if model is None or window_tokens is None else model.modules()
    cores = [module for module in modules if isinstance(module, AttentionModule)]
    hooks = [core.register_forward_pre_hook(add) for core in cores]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()
