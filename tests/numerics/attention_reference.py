"""Each kind of attention as its definition says, over whole T x T matrices: what the block-wise code is held against.

Dimensions: T context, H query heads, G key/value heads, S head size, M width of phi.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from escala.schema import ModelConfig
from workloads.model.attention.features import LinearAttention, feature_map
from workloads.model.attention.hybrid import Hybrid, NearAndFar
from workloads.model.attention.nystrom import Nystrom
from workloads.model.attention.registry import AttentionModule


def dense(
    module: AttentionModule, config: ModelConfig, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None
) -> Tensor:
    """out_BTHS of every kind, a row, a head and a matrix at a time."""
    rows = []
    for row in range(len(q)):
        heads = []
        for head in range(config.n_heads):
            group = head // (config.n_heads // config.kv_heads)
            seen = visible(q.shape[1], None if documents is None else documents[row])
            weights = kernel(module, config, q[row, :, head], k[row, :, group], head, group, seen)
            heads.append(weights @ v[row, :, group] / weights.sum(-1, keepdim=True))
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


def visible(context: int, documents_T: Tensor | None) -> Tensor:
    seen = torch.ones(context, context, dtype=torch.bool).tril()
    return seen if documents_T is None else seen & (documents_T[:, None] == documents_T[None])


def kernel(
    module: AttentionModule, config: ModelConfig, q: Tensor, k: Tensor, head: int, group: int, seen: Tensor
) -> Tensor:
    """The weights before normalisation, (T, T), 0 where a query sees no key."""
    sharp = (q @ k.T / math.sqrt(config.head_size)).exp() * seen
    kind = config.attention.kind
    position = torch.arange(len(q))
    if kind == "exact":
        return sharp
    if kind == "window":
        return sharp * (position[:, None] - position < (config.window_tokens or 0))
    assert isinstance(module, LinearAttention | NearAndFar)
    temperature = module.unit.temperature_G[group]
    x, y = (temperature * each / each.norm(dim=-1, keepdim=True) for each in (q, k))
    # Nystrom with all of a block's tokens its landmarks and no ridge is its kernel.
    smooth = seen * ((x @ y.T).exp() if isinstance(module, Nystrom) else _by_features(module, x, y, group))
    if kind == "features":
        return smooth
    assert isinstance(module, NearAndFar)
    block = position // ((config.window_tokens or 0) // 2)
    near = block[:, None] - block < 2
    return torch.where(near, sharp, module.gain_H[head].exp() * smooth)


def _by_features(module: AttentionModule, x: Tensor, y: Tensor, group: int) -> Tensor:
    """phi(x) . phi(y), (T, T)."""
    assert isinstance(module, LinearAttention | Hybrid)
    rows = module.sums.rows(x)[group][None]
    kind_of_map = module.sums.features.kind
    phi_x, phi_y = (feature_map(each[None, :, None], kind_of_map, rows)[0, :, 0] for each in (x, y))
    return phi_x @ phi_y.T
