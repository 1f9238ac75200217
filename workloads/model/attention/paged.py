"""Attention over a paged cache, block by block, the same sums in the same order whatever else is in the batch.

Queries come in tiles: a decoding row is a tile of one query, a piece of a prompt tiles of one block of queries. Each
(tile, block) pair is one small matrix of a batched product; a tile's scores are then put side by side for an exact
softmax, and the pairs' outputs are summed in the order of positions. The blocks of decoding rows are read in place,
as one view of the cache's used part; those that several tiles read are copied beside it (`copied_blocks`).

SDPA on gathered blocks took 5 (fp32) to 15 (bf16) times as long on CPU: 32 rows of 108 keys, 10 heads of 64.

Dimensions: T tiles, Q queries of a tile, P pairs, L blocks of the longest tile, G key/value heads, E query heads of
each, R = Q * E, K positions of a block, S head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from escala.schema import ModelConfig

REGISTER = 16  # fp32 numbers: softmax sums a row shorter than this in another order than a padded one


class PagedCache:
    """Keys and values of `blocks` blocks for every layer, (layers, blocks, G, K, S) each.

    Zeros to begin with: a masked position weighs 0, and 0 times uninitialised memory may be NaN.

    Args:
        window_tokens: a query sees this many keys at most; None: all.
        past_blocks: a query sees this many blocks before its own; None: all.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        block_tokens: int,
        like: Tensor,
        window_tokens: int | None = None,
        past_blocks: int | None = None,
    ) -> None:
        shape = (config.n_layers, blocks, config.kv_heads, block_tokens, config.head_size)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.block_tokens, self.window_tokens, self.past_blocks = block_tokens, window_tokens, past_blocks
        self.copied_blocks = 0  # of one layer, keys and values together, so far

    @property
    def block_bytes(self) -> int:
        """Of one layer, keys and values together."""
        return 2 * self.keys[0, 0].numel() * self.keys.element_size()

    def tile_numbers(self, queries: int, heads: int, blocks: int, of_several: bool) -> int:
        """Scores, and keys and values where they are copied: blocks that several tiles read are."""
        _, _, kv_heads, block_tokens, head_size = self.keys.shape
        copied = 2 * kv_heads * head_size if of_several else 0
        if self.window_tokens is not None:
            blocks = min(blocks, (self.window_tokens + queries - 3) // block_tokens + 2)
        if self.past_blocks is not None:
            blocks = min(blocks, self.past_blocks + 1)
        return blocks * block_tokens * (queries * heads + copied)

    def plan_borders(self, tables: Sequence[Sequence[int]], spans: Sequence[range]) -> None:
        """Nothing."""

    def write(
        self, layer: int, blocks: Tensor, offsets: Tensor, k_NGS: Tensor, v_NGS: Tensor, borders: None = None
    ) -> None:
        """Store N positions, the n-th at offset[n] of block[n]."""
        self.keys[layer, blocks, :, offsets] = k_NGS
        self.values[layer, blocks, :, offsets] = v_NGS

    def plan(self, tables: Sequence[Sequence[int]], positions_TQ: Tensor) -> TilePlan:
        """Queries stand at `positions_TQ` (int64 on the CPU, where all of the plan is made, ascending along Q) and see
        positions up to their own, in `tables`, of each tile its request's blocks in the order of positions.
        """
        size, device = self.block_tokens, self.keys.device
        last_T = positions_TQ[:, -1] // size
        first_T = torch.zeros_like(last_T)
        if self.window_tokens is not None:
            first_T = (positions_TQ[:, 0] - self.window_tokens + 1).clamp(min=0) // size
        if self.past_blocks is not None:
            first_T = (last_T - self.past_blocks).clamp(min=0)
        in_place = device.type == "cpu" and positions_TQ.shape[1] == 1
        pairs = pair_up(tables, first_T, last_T, in_place, -(-REGISTER // size))
        keys_TP = first_T[:, None] * size + torch.arange(pairs.places * size)
        distance_TQP = positions_TQ[:, :, None] - keys_TP[:, None, :]
        unseen_TQP = distance_TQP < 0
        if self.window_tokens is not None:
            unseen_TQP |= distance_TQP >= self.window_tokens
        bias = torch.zeros(distance_TQP.shape).masked_fill_(unseen_TQP, float("-inf"))
        bias = bias.view(len(tables), -1, 1, pairs.places, size).unsqueeze(1)
        return TilePlan(pairs.to(device), bias.to(device))

    def attend(self, q_TQGES: Tensor, layer: int, plan: TilePlan) -> Tensor:
        """softmax(q k^T / sqrt(S)) v over each tile's blocks, output_TQGES in fp32.

        Each product is rounded to the cache's dtype; softmax and the sum over blocks are in fp32.
        """
        return _attend(q_TQGES, self, layer, plan)[0]

    def attend_with_lse(self, q_TQGES: Tensor, layer: int, plan: TilePlan) -> tuple[Tensor, Tensor]:
        """(output_TQGES, log-sum-exp_TGQE of its scores), in fp32."""
        output_TQGES, scores_TGQEP, weights_TGQEP = _attend(q_TQGES, self, layer, plan)
        return output_TQGES, scores_TGQEP.amax(-1) - weights_TGQEP.amax(-1).log()


@dataclass(frozen=True)
class Pairs:
    """Which tile meets which blocks in one forward pass; the same for all layers.

    Attributes:
        low, span: blocks [low, low + span) of the cache are read in place.
        places: L.
        view_tile: (span,), the tile that reads each of them (any where none does).
        extra_block, extra_tile: (extras,), further pairs, whose blocks are copied.
        slot: (T * L,), the pair at each place of a tile, pairs in place first, then extras (any where none).
        home: (span + extras,), the inverse: the place of each pair (any where none).
        filled: (T * L, 1, 1, 1), 1 where a pair is at a place.
    """

    low: int
    span: int
    places: int
    view_tile: Tensor
    extra_block: Tensor
    extra_tile: Tensor
    slot: Tensor
    home: Tensor
    filled: Tensor

    def to(self, device: torch.device) -> Pairs:
        """The same on `device`."""
        tensors = (self.view_tile, self.extra_block, self.extra_tile, self.slot, self.home, self.filled)
        return Pairs(self.low, self.span, self.places, *(x.to(device) for x in tensors))

    def parts(self, q_TGRS: Tensor, *kept: Tensor) -> list[tuple[Tensor, ...]]:
        """(queries, what is `kept` of blocks) of the pairs in place and of the copied ones, (pairs * G, ...) each."""
        found = []
        if self.span:
            q = q_TGRS.index_select(0, self.view_tile).flatten(0, 1)
            view = slice(self.low, self.low + self.span)
            found.append((q, *(x[view].flatten(0, 1) for x in kept)))
        if len(self.extra_block):
            q = q_TGRS.index_select(0, self.extra_tile).flatten(0, 1)
            found.append((q, *(x.index_select(0, self.extra_block).flatten(0, 1) for x in kept)))
        return found

    def sum(self, products: list[Tensor], tiles: int, heads: int) -> Tensor:
        """Of each tile the sum of its pairs' products (pairs * G, R, S), in the order of positions: (T, G, R, S) in the
        dtype of `filled`.
        """
        found = _cat(products)
        output_PGRS = torch.unflatten(found, 0, (-1, heads))
        filled = output_PGRS.index_select(0, self.slot).mul(self.filled)
        output_TLGRS = torch.unflatten(filled, 0, (tiles, self.places))
        return output_TLGRS.sum(1)


@dataclass(frozen=True)
class TilePlan:
    """How the tiles of one forward pass read the cache; the same for all layers.

    Attributes:
        bias: (T, 1, Q, 1, L, K), 0 where a query sees a position, -inf where not.
    """

    pairs: Pairs
    bias: Tensor


def pair_up(
    tables: Sequence[Sequence[int]], first_T: Tensor, last_T: Tensor, in_place: bool, least_places: int
) -> Pairs:
    """The pairs of tiles with their blocks [first_T, last_T], of `tables`, on the CPU. One tile at least has one."""
    counts_T = last_T - first_T + 1
    tiles, places = len(tables), max(int(counts_T.max()), least_places)
    shift_T = torch.arange(tiles) * places - counts_T.cumsum(0) + counts_T
    tile = torch.arange(tiles).repeat_interleave(counts_T)
    place = torch.arange(len(tile)) + shift_T[tile]
    spans = zip(tables, first_T.tolist(), last_T.tolist(), strict=True)
    block = torch.tensor([b for table, a, z in spans for b in table[a : z + 1]])
    low, span, view_tile, row, extra = _choose_view(block, tile, in_place)
    slot, filled = torch.zeros(tiles * places, dtype=torch.int64), torch.zeros(tiles * places, 1, 1, 1)
    slot[place], filled[place] = row, 1.0
    home = torch.zeros(span + len(extra), dtype=torch.int64)
    home[row] = place
    return Pairs(low, span, places, view_tile, block[extra], tile[extra], slot, home, filled)


def _choose_view(block: Tensor, tile: Tensor, in_place: bool) -> tuple[int, int, Tensor, Tensor, Tensor]:
    """(low, span, tile of each block in place, row of each pair, pairs whose blocks are copied).

    A copied block costs about twice one read in place (CPU), so a view up to half idle is taken.
    """
    pairs = torch.arange(len(block))
    if not in_place:
        return 0, 0, pairs[:0], pairs, pairs
    low, high = (int(end) for end in block.aminmax())
    span = high - low + 1
    first_pair = torch.full((span,), len(block)).scatter_reduce_(0, block - low, pairs, "amin")
    used = (first_pair < len(block)).nonzero().squeeze(1)
    if span > 2 * len(used):
        return 0, 0, pairs[:0], pairs, pairs
    view_tile = torch.zeros(span, dtype=torch.int64)
    view_tile[used] = tile[first_pair[used]]
    row = block - low
    extra = (first_pair[row] != pairs).nonzero().squeeze(1)
    row[extra] = span + torch.arange(len(extra))
    return low, span, view_tile, row, extra


def _attend(q_TQGES: Tensor, cache: PagedCache, layer: int, plan: TilePlan) -> tuple[Tensor, Tensor, Tensor]:
    """(output_TQGES, scores and weights (T, G, Q, E, L * K)), in fp32."""
    tiles, queries, heads, each, size = q_TQGES.shape
    places, block_tokens = plan.bias.shape[-2:]
    q_TGRS = q_TQGES.transpose(1, 2).reshape(tiles, heads, queries * each, size)
    parts = plan.pairs.parts(q_TGRS, cache.keys[layer], cache.values[layer])
    cache.copied_blocks += len(plan.pairs.extra_block)
    scores_PGRK = _cat(
        [torch.bmm(q, k.transpose(1, 2)).view(-1, heads, queries * each, block_tokens) for q, k, _ in parts]
    )
    scores_TLGQEK = scores_PGRK.index_select(0, plan.pairs.slot).view(
        tiles, places, heads, queries, each, block_tokens
    )
    scores_TGQELK = torch.empty(
        (tiles, heads, queries, each, places, block_tokens), dtype=torch.float32, device=q_TQGES.device
    )
    torch.add(plan.bias, scores_TLGQEK.permute(0, 2, 3, 4, 1, 5), alpha=size**-0.5, out=scores_TGQELK)
    weights_TGQEP = scores_TGQELK.flatten(-2).softmax(-1)
    weights_TLGQEK = torch.empty_like(scores_TLGQEK)
    weights_TLGQEK.permute(0, 2, 3, 4, 1, 5).copy_(weights_TGQEP.view_as(scores_TGQELK))
    weights_PGRK = weights_TLGQEK.view(tiles * places, heads, queries * each, block_tokens).index_select(
        0, plan.pairs.home
    )
    sizes = [len(q) // heads for q, _, _ in parts]
    products = [
        torch.bmm(w.flatten(0, 1), v)
        for w, (_, _, v) in zip(torch.split(weights_PGRK, sizes), parts, strict=True)
    ]
    output_TGQES = plan.pairs.sum(products, tiles, heads).view(tiles, heads, queries, each, size)
    return output_TGQES.transpose(1, 2), scores_TGQELK.flatten(-2), weights_TGQEP


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
