"""Generation with exact attention near by and a far part: keys and values of blocks, and what the kind keeps beside.

Dimensions: T tiles, Q queries of a tile, G key/value heads, E query heads of each, N = T * G, S head size, V = S + 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from escala.contract.errors import SpecError
from escala.schema import ModelConfig
from workloads.model.attention.features import UnitScale
from workloads.model.attention.paged import PagedCache, TilePlan


class FarModule(Protocol):
    """What a layer's module says of its far part (`workloads.model.attention.hybrid.NearAndFar`)."""

    @property
    def unit(self) -> UnitScale: ...
    @property
    def gain_H(self) -> Tensor: ...
    @property
    def is_far_bypassed(self) -> bool: ...


@dataclass(frozen=True)
class NearAndFarPlan:
    """How tiles read both parts.

    Attributes:
        count_T1111: keys that are far from each tile.
        none_T1111: -inf where there are none, else 0; None: each tile has some.
        far: of the kind; None: no tile has any.
    """

    near: TilePlan
    count_T1111: Tensor
    none_T1111: Tensor | None
    far: Any


class NearAndFarState(ABC):
    """Keys and values, of which a query sees its own block's and those of the one before. Blocks are the kind's own.

    Raises SpecError for a block_tokens that is not S.
    """

    def __init__(
        self,
        layers: Sequence[FarModule],
        config: ModelConfig,
        size: int,
        blocks: int,
        block_tokens: int,
        like: Tensor,
    ) -> None:
        if block_tokens != size:
            raise SpecError(
                f"Attention {config.attention.kind} of window_tokens {config.window_tokens} can't be served from "
                f"blocks of {block_tokens} tokens: its own are of {size}, half the window.",
                f"Leave the engine's block_tokens out, or set it to {size}.",
            )
        self._modules, self.block_tokens = layers, block_tokens
        self.near = PagedCache(config, blocks, block_tokens, like, past_blocks=1)

    @abstractmethod
    def plan_borders(self, tables: Sequence[Sequence[int]], spans: Sequence[range]) -> Any:
        """See DecodeState."""

    @abstractmethod
    def make_far(self, layer: int, borders: Any) -> None:
        """Make what the kind keeps beside blocks, once the new positions are in the cache."""

    @abstractmethod
    def plan_far(self, tables: Sequence[Sequence[int]], place_T: Tensor, in_place: bool) -> Any:
        """Of tiles whose blocks stand at `place_T`; at least one of them has a far key."""

    @abstractmethod
    def far(
        self, layer: int, x_GNS: Tensor, plan: NearAndFarPlan
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(sums_TGRV of the far keys, least_G or nothing, log_scale_G) of queries at unit norm, in the order of tiles,
        N = T * R. What is returned is e^-log_scale of the kernel's; None: 0. A far key adds `least` at least to a
        denominator; None: the sums say so themselves.
        """

    def tile_numbers(self, queries: int, heads: int, blocks: int, of_several: bool) -> int:
        """See DecodeState; of the near part."""
        return self.near.tile_numbers(queries, heads, blocks, of_several)

    def write(
        self, layer: int, blocks: Tensor, offsets: Tensor, k_NGS: Tensor, v_NGS: Tensor, borders: Any
    ) -> None:
        """See DecodeState."""
        self.near.write(layer, blocks, offsets, k_NGS, v_NGS)
        self.make_far(layer, borders)

    def plan(self, tables: Sequence[Sequence[int]], positions_TQ: Tensor) -> NearAndFarPlan:
        """See DecodeState."""
        near, device = self.near.plan(tables, positions_TQ), self.near.keys.device
        place_T = positions_TQ[:, -1] // self.block_tokens
        count_T = (place_T - 1).clamp(min=0) * self.block_tokens
        in_place = device.type == "cpu" and positions_TQ.shape[1] == 1
        far = self.plan_far(tables, place_T, in_place) if bool(count_T.any()) else None
        count_T1111 = count_T.view(-1, 1, 1, 1, 1).to(device)
        none = None if bool(count_T.all()) else torch.zeros(count_T1111.shape, device=device)
        if none is not None:
            none.masked_fill_(count_T1111 == 0, float("-inf"))
        return NearAndFarPlan(near, count_T1111, none, far)

    def attend(self, q_TQGES: Tensor, layer: int, plan: NearAndFarPlan) -> Tensor:
        """Both parts under one normaliser: near + (far - near) / (1 + e^(lse near - lse far)). No logaddexp, sigmoid or
        addcmul: they compute the last numbers of a tensor by other code than the first, and with other bits.
        """
        near_TQGES, lse_TGQE = self.near.attend_with_lse(q_TQGES, layer, plan.near)
        module = self._modules[layer]
        if plan.far is None or module.is_far_bypassed:
            return near_TQGES
        tiles, queries, heads, each, size = q_TQGES.shape
        q_GNS = q_TQGES.permute(2, 0, 3, 1, 4).reshape(heads, -1, size)
        sums_TGRV, least_G, log_scale_G = self.far(layer, module.unit.scaled(q_GNS), plan)
        sums_TGEQV = sums_TGRV.reshape(tiles, heads, each, queries, size + 1)
        sum_TGEQS, count_TGEQ1 = sums_TGEQV[..., :-1], sums_TGEQV[..., -1:]
        if least_G is not None:
            count_TGEQ1 = torch.maximum(count_TGEQ1, least_G.view(-1, 1, 1, 1) * plan.count_T1111)
        log_weight = module.gain_H.to(sum_TGEQS.dtype).view(heads, each, 1, 1)
        if log_scale_G is not None:
            log_weight = log_weight + log_scale_G.view(-1, 1, 1, 1)
        if plan.none_T1111 is not None:
            log_weight = log_weight + plan.none_T1111
            count_TGEQ1 = torch.where(plan.count_T1111 > 0, count_TGEQ1, 1.0)
        near_TGEQS = near_TQGES.permute(0, 2, 3, 1, 4)
        odds_TGEQ1 = (lse_TGQE.transpose(2, 3).unsqueeze(-1) - (log_weight + count_TGEQ1.log())).exp()
        out_TGEQS = near_TGEQS + (sum_TGEQS / count_TGEQ1 - near_TGEQS) / (odds_TGEQ1 + 1.0)
        return out_TGEQS.permute(0, 3, 1, 2, 4)
