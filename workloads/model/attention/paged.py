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

REGISTER = 16  # fp32 numbers: softmax sums a row shorter than this in another order than a padded one


class PagedCache:
    """Keys and values of `blocks` blocks for every layer, (layers, blocks, G, K, S) each.

    Zeros to begin with: a masked position weighs 0, and 0 times uninitialised memory may be NaN.
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        kv_heads: int,
        block_tokens: int,
        head_size: int,
        like: Tensor,
        window_tokens: int | None = None,
    ) -> None:
        shape = (layers, blocks, kv_heads, block_tokens, head_size)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.block_tokens, self.window_tokens = block_tokens, window_tokens
        self.copied_blocks = 0  # of one layer, keys and values together, so far

    @property
    def block_bytes(self) -> int:
        """Of one layer, keys and values together."""
        return 2 * self.keys[0, 0].numel() * self.keys.element_size()

    def tile_numbers(self, queries: int, heads: int, blocks: int, of_several: bool) -> int:
        """Scores, and keys and values where they are copied: blocks that several tiles read are."""
        _, _, kv_heads, block_tokens, head_size = self.keys.shape
        copied = 2 * kv_heads * head_size if of_several else 0
        return blocks * block_tokens * (queries * heads + copied)

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, k_NGS: Tensor, v_NGS: Tensor) -> None:
        """Store N positions, the n-th at offset[n] of block[n]."""
        self.keys[layer, blocks, :, offsets] = k_NGS
        self.values[layer, blocks, :, offsets] = v_NGS

    def plan(self, tables: Sequence[Sequence[int]], positions_TQ: Tensor) -> TilePlan:
        """See `plan_tiles`."""
        return plan_tiles(tables, positions_TQ, self.block_tokens, self.window_tokens, self.keys.device)

    def attend(self, q_TQGES: Tensor, layer: int, plan: TilePlan) -> Tensor:
        """See `attend`."""
        return attend(q_TQGES, self, layer, plan)


@dataclass(frozen=True)
class TilePlan:
    """How the tiles of one forward pass read the cache; the same for all layers.

    Attributes:
        low, span: blocks [low, low + span) of the cache are read in place.
        view_tile: (span,), the tile that reads each of them (any where none does).
        extra_block, extra_tile: (extras,), further pairs, whose blocks are copied.
        slot: (T * L,), the pair at each place of a tile, pairs in place first, then extras (any where none).
        home: (span + extras,), the inverse: the place of each pair (any where none).
        filled: (T * L, 1, 1, 1), 1 where a pair is at a place.
        bias: (T, 1, Q, 1, L, K), 0 where a query sees a position, -inf where not.
    """

    low: int
    span: int
    view_tile: Tensor
    extra_block: Tensor
    extra_tile: Tensor
    slot: Tensor
    home: Tensor
    filled: Tensor
    bias: Tensor


def plan_tiles(
    tables: Sequence[Sequence[int]],
    positions_TQ: Tensor,
    block_tokens: int,
    window: int | None,
    device: torch.device,
) -> TilePlan:
    """The plan of tiles whose queries stand at `positions_TQ` and see positions up to their own, `window` at most.

    Args:
        tables: of each tile, its request's blocks in the order of positions.
        positions_TQ: ascending along Q, int64 on the CPU, where all of the plan is made.
    """
    last_T = positions_TQ[:, -1] // block_tokens
    first_T = torch.zeros_like(last_T)
    if window is not None:
        first_T = (positions_TQ[:, 0] - window + 1).clamp(min=0) // block_tokens
    counts_T = last_T - first_T + 1
    tiles, places = len(tables), max(int(counts_T.max()), -(-REGISTER // block_tokens))
    shift_T = torch.arange(tiles) * places - counts_T.cumsum(0) + counts_T
    tile = torch.arange(tiles).repeat_interleave(counts_T)
    place = torch.arange(len(tile)) + shift_T[tile]
    spans = zip(tables, first_T.tolist(), last_T.tolist(), strict=True)
    block = torch.tensor([b for table, a, z in spans for b in table[a : z + 1]])
    in_place = device.type == "cpu" and positions_TQ.shape[1] == 1
    low, span, view_tile, row, extra = _choose_view(block, tile, in_place)
    slot, filled = torch.zeros(tiles * places, dtype=torch.int64), torch.zeros(tiles * places, 1, 1, 1)
    slot[place], filled[place] = row, 1.0
    home = torch.zeros(span + len(extra), dtype=torch.int64)
    home[row] = place
    keys_TP = first_T[:, None] * block_tokens + torch.arange(places * block_tokens)
    distance_TQP = positions_TQ[:, :, None] - keys_TP[:, None, :]
    unseen_TQP = distance_TQP < 0
    if window is not None:
        unseen_TQP |= distance_TQP >= window
    bias = torch.zeros(distance_TQP.shape).masked_fill_(unseen_TQP, float("-inf"))
    bias = bias.view(tiles, -1, 1, places, block_tokens).unsqueeze(1)
    tensors = (view_tile, block[extra], tile[extra], slot, home, filled, bias)
    return TilePlan(low, span, *(tensor.to(device) for tensor in tensors))


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


def attend(q_TQGES: Tensor, cache: PagedCache, layer: int, plan: TilePlan) -> Tensor:
    """softmax(q k^T / sqrt(S)) v over each tile's blocks, output_TQGES in fp32.

    Each product is rounded to the cache's dtype; softmax and the sum over blocks are in fp32.
    """
    tiles, queries, heads, each, size = q_TQGES.shape
    places, block_tokens = plan.bias.shape[-2:]
    q_TGRS = q_TQGES.transpose(1, 2).reshape(tiles, heads, queries * each, size)
    parts = _pairs(q_TGRS, cache, layer, plan)
    scores_PGRK = _cat(
        [torch.bmm(q, k.transpose(1, 2)).view(-1, heads, queries * each, block_tokens) for q, k, _ in parts]
    )
    scores_TLGQEK = scores_PGRK.index_select(0, plan.slot).view(
        tiles, places, heads, queries, each, block_tokens
    )
    scores_TGQELK = torch.empty(
        (tiles, heads, queries, each, places, block_tokens), dtype=torch.float32, device=q_TQGES.device
    )
    torch.add(plan.bias, scores_TLGQEK.permute(0, 2, 3, 4, 1, 5), alpha=size**-0.5, out=scores_TGQELK)
    weights_TGQELK = scores_TGQELK.flatten(-2).softmax(-1).view_as(scores_TGQELK)
    weights_TLGQEK = torch.empty_like(scores_TLGQEK)
    weights_TLGQEK.permute(0, 2, 3, 4, 1, 5).copy_(weights_TGQELK)
    weights_PGRK = weights_TLGQEK.view(tiles * places, heads, queries * each, block_tokens).index_select(
        0, plan.home
    )
    sizes = [len(q) // heads for q, _, _ in parts]
    products = [
        torch.bmm(w.flatten(0, 1), v)
        for w, (_, _, v) in zip(torch.split(weights_PGRK, sizes), parts, strict=True)
    ]
    output_PGRS = _cat(products).view(-1, heads, queries * each, size)
    filled = output_PGRS.index_select(0, plan.slot).mul(plan.filled)
    output_TLGRS = torch.unflatten(filled, 0, (tiles, places))
    output_TGQES = output_TLGRS.sum(1).view(tiles, heads, queries, each, size)
    return output_TGQES.transpose(1, 2)


def _pairs(
    q_TGRS: Tensor, cache: PagedCache, layer: int, plan: TilePlan
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(queries, keys, values) of the pairs in place and of the copied ones, (pairs * G, R or K, S) each."""
    found, keys, values = [], cache.keys[layer], cache.values[layer]
    if plan.span:
        q = q_TGRS.index_select(0, plan.view_tile).flatten(0, 1)
        view = slice(plan.low, plan.low + plan.span)
        found.append((q, keys[view].flatten(0, 1), values[view].flatten(0, 1)))
    if len(plan.extra_block):
        cache.copied_blocks += len(plan.extra_block)
        q = q_TGRS.index_select(0, plan.extra_tile).flatten(0, 1)
        k, v = (x.index_select(0, plan.extra_block).flatten(0, 1) for x in (keys, values))
        found.append((q, k, v))
    return found


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
