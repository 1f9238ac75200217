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
        count_T: keys that are far from each tile.
        far: of the kind; None: no tile has a far key.
    """

    near: TilePlan
    count_T: Tensor
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
        return NearAndFarPlan(near, count_T.to(device), far)

    def attend(self, q_TQGES: Tensor, layer: int, plan: NearAndFarPlan) -> Tensor:
        """See DecodeState."""
        near_TQGES, lse_TGQE = self.near.attend_with_lse(q_TQGES, layer, plan.near)
        module = self._modules[layer]
        if plan.far is None or module.is_far_bypassed:
            return near_TQGES
        tiles, queries, heads, each, size = q_TQGES.shape
        q_GNS = q_TQGES.permute(2, 0, 3, 1, 4).reshape(heads, -1, size)
        sums_TGRV, least_G, log_scale_G = self.far(layer, module.unit.scaled(q_GNS), plan)
        sums_NEQV = sums_TGRV.reshape(tiles * heads, each, queries, size + 1)
        count_N11 = plan.count_T.repeat_interleave(heads).view(-1, 1, 1)
        denominator_NEQ = sums_NEQV[..., -1]
        if least_G is not None:
            denominator_NEQ = torch.maximum(denominator_NEQ, least_G.repeat(tiles).view(-1, 1, 1) * count_N11)
        log_weight_GE = module.gain_H.to(sums_NEQV.dtype).view(heads, each)
        if log_scale_G is not None:
            log_weight_GE = log_weight_GE + log_scale_G[:, None]
        out_NEQS = _one_normaliser(
            near_TQGES.permute(0, 2, 3, 1, 4).reshape(-1, each, queries, size),
            lse_TGQE.transpose(2, 3).reshape(-1, each, queries),
            sums_NEQV[..., :-1],
            denominator_NEQ.masked_fill(count_N11 == 0, 0.0),
            log_weight_GE.repeat(tiles, 1).unsqueeze(-1),
        )
        return out_NEQS.view(tiles, heads, each, queries, size).permute(0, 3, 1, 2, 4)


def _one_normaliser(
    near_NEQS: Tensor,
    lse_NEQ: Tensor,
    numerator_NEQS: Tensor,
    denominator_NEQ: Tensor,
    log_weight_NE1: Tensor,
) -> Tensor:
    """(e^lse near + e^w numerator) / (e^lse + e^w denominator), the same bits wherever a number stands in a tensor:
    logaddexp and addcmul compute the last numbers of one by other code.
    """
    log_far_NEQ = log_weight_NE1 + denominator_NEQ.log()
    shift_NEQ = torch.maximum(lse_NEQ, log_far_NEQ)
    near_weight, far_weight = (lse_NEQ - shift_NEQ).exp(), (log_far_NEQ - shift_NEQ).exp()
    scale_NEQ = torch.where(denominator_NEQ > 0, log_weight_NE1 - shift_NEQ, 0.0).exp()
    mixed_NEQS = near_NEQS * near_weight.unsqueeze(-1) + numerator_NEQS * scale_NEQ.unsqueeze(-1)
    return mixed_NEQS / (near_weight + far_weight).unsqueeze(-1)


def by_tile(x_GNS: Tensor, tiles: int) -> Tensor:
    """(T, G, R, S) of (G, T * R, S)."""
    return torch.unflatten(x_GNS, 1, (tiles, -1)).transpose(0, 1)
