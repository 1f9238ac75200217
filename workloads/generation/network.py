"""A Transformer's forward pass over a paged cache: matrices of one input joined, each laid out for its kernel once.

Dimensions: N tokens (rows) of any requests, D model width, H query heads, G key/value heads, E = H / G, S head size,
T tiles, Q queries of a tile, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from escala.contract.errors import CheckpointError
from escala.schema.compression import Precision, QuantizationConfig
from workloads.generation import kernel_choice
from workloads.generation.expert_counts import ExpertCounts, Keep
from workloads.generation.feed_forward import lay_feed_forward
from workloads.generation.kernel_choice import MEMORY_BYTES, EngineLimits, Kernels, KernelTiming
from workloads.generation.matrices import Layout, Stored, groups_of, release, sample, unembedding_of
from workloads.model.attention.registry import DecodeState, decode_state
from workloads.model.compression.plan import quantize_model
from workloads.model.rope import RotaryTable, rotate
from workloads.model.transformer import Block, Transformer

GROUP_NUMBERS = 1 << 23  # that the attention of one group of tiles holds in memory: 32 MB in fp32
MEASURED = "measured"
"""In place of a choice of kernels: measure."""
LIMITS = EngineLimits(rows=32, tile_rows=256)


@dataclass(frozen=True)
class TokenSpan:
    """Successive tokens of one request to be computed.

    Args:
        tokens: their ids.
        start: the position of the first.
        table: the request's blocks, up to the last position at least; those that are not read may be any number.
        wanted: how many of the last tokens' hidden states are.
        slot: the request's place among those that run, by which its experts' places are counted.
    """

    tokens: Sequence[int]
    start: int
    table: Sequence[int]
    wanted: int = 1
    slot: int = 0


@dataclass(frozen=True)
class _Group:
    """Some tiles, whose tokens are the rows `rows`: `take` (T * Q) rows to queries, `give` queries to rows."""

    plan: Any
    rows: slice
    queries: int
    take: Tensor
    give: Tensor


@dataclass(frozen=True)
class Smaller:
    """How the matrices of a model in full precision are stored smaller.

    Args:
        precision: int8 or int4.
        quantization: its options.
        calibration_BT: tokens whose activations scale the weights before they are rounded; None: none do.
    """

    precision: Precision
    quantization: QuantizationConfig
    calibration_BT: Tensor | None = None

    def apply(self, model: Transformer) -> None:
        """In place; matrices that are compressed already stay as they are."""
        quantize_model(model, self.precision, self.quantization, self.calibration_BT)


class Network:
    """The model made ready to generate. It reads `model`'s embedding and norms, and has the rest in its own layout.

    Args:
        model: in fp32 or bf16; matrices of it may be compressed, and are released then.
        kernels: a choice as text; MEASURED: the fastest here; None: the first that can.
        limits: that the choice is made for.
        smaller: how matrices that are not compressed are, in these weights and in later ones; None: they stay.

    Attributes:
        kernels: the choice as text: whoever follows it gets the same bits.
        timings: what was measured.

    Raises SpecError where the choice of kernels cannot be followed, or the matrices cannot be stored so.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        kernels: str | None = None,
        limits: EngineLimits = LIMITS,
        smaller: Smaller | None = None,
    ) -> None:
        self._limits, self._smaller = limits, smaller
        self._outline = _outline_of(model)
        self.config, self.timings = model.config, list[KernelTiming]()
        self._rotary = RotaryTable(self.config.head_size, self.config.rope_base)
        self.model = self._ready(model)
        self._kernels = self._choose(kernels)
        self.kernels = kernel_choice.to_text(self._kernels)
        self._lay_out()

    def _ready(self, model: Transformer) -> Transformer:
        if self._smaller is not None:
            self._smaller.apply(model)
        return model.requires_grad_(False).eval()

    def _choose(self, told: str | None) -> Kernels:
        groups = self._matrix_groups()
        if told == MEASURED:
            some = sample(groups, MEMORY_BYTES)
            chosen, self.timings = kernel_choice.measure(some, self._limits)
            return chosen
        some = sample(groups, 0)
        return (
            kernel_choice.follow(told, some, self._limits)
            if told
            else kernel_choice.first(some, self._limits)
        )

    def _matrix_groups(self) -> Iterator[list[Stored]]:
        for block in self.model.layers:
            yield from groups_of(block)
        yield [unembedding_of(self._output)]

    @property
    def _output(self) -> nn.Module:
        return self.model.unembedding or self.model.embedding

    @property
    def like(self) -> Tensor:
        """A tensor of the model's dtype on its device."""
        return self.model.embedding.weight

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state dictionary over the weights; one in full precision is stored smaller as `smaller` says, also
        where the first one came compressed. Raises CheckpointError, with nothing changed, where it does not fit.
        """
        outline = self._outline_for(state)
        own = outline.state_dict()
        wrong = {n for n in own.keys() & state.keys() if own[n].shape != state[n].shape}
        problems = {
            "missing": own.keys() - state.keys(),
            "unknown": state.keys() - own.keys(),
            "of another shape": wrong,
        }
        found = [f"{kind}: {', '.join(sorted(names)[:3])}" for kind, names in problems.items() if names]
        if found:
            hint = "Send the state_dict of a model with the engine's own ModelConfig."
            raise CheckpointError(f"These weights are not this model's ({'; '.join(found)}).", hint)
        if self._is_whole:
            for name, weight in self.model.state_dict().items():
                weight.copy_(state[name])
        else:
            model = copy.deepcopy(outline)
            model.load_state_dict({n: w.to(own[n].dtype) for n, w in state.items()}, assign=True)
            self.model = self._ready(model)
            others = kernel_choice.first(
                sample(self._matrix_groups(), 0), self._limits
            )  # of forms that the first had not
            self._kernels = {**others, **self._kernels}
            for weight in (*self.model.parameters(), *self.model.buffers()):
                weight.data = weight.data.clone()  # what was given may be the sender's memory
        self._lay_out()

    def _outline_for(self, state: Mapping[str, Tensor]) -> Transformer:
        if self._smaller is None or state.keys() == self._outline.state_dict().keys():
            return self._outline
        with torch.device("meta"):
            return Transformer(self.config)

    @property
    def _is_whole(self) -> bool:
        return not any(weight.is_meta for weight in self.model.state_dict().values())

    def _lay_out(self) -> None:
        layout = Layout(self._kernels, self._limits)
        self._blocks = []
        for block in self.model.layers:
            self._blocks.append(_LaidBlock(block, layout))
            release(block)
        self._unembedding = layout.lay([unembedding_of(self._output)])
        release(self._output)
        self._laid_bytes = layout.nbytes

    @property
    def weight_bytes(self) -> int:
        """That weights hold in memory: as they are laid out, and the model's own that stay."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return self._laid_bytes + sum({t.data_ptr(): t.nbytes for t in tensors if not t.is_meta}.values())

    def decode_state(self, blocks: int, block_tokens: int) -> DecodeState:
        """An empty one, of the kind of the model's attention."""
        cores = [block.attention.core for block in self.model.layers]
        return decode_state(cores, blocks, block_tokens, self.like)

    def expert_counts(self, factor: float | None) -> ExpertCounts | None:
        """Counts for as many requests as the limits have rows, at a capacity factor; None without one, or for a dense
        model.
        """
        moe = self.config.moe
        if factor is None or moe is None:
            return None
        return ExpertCounts(self.config, moe, factor, self._limits.rows, self.like)

    def forward(
        self,
        pieces: Sequence[TokenSpan],
        cache: DecodeState,
        tiled: bool,
        counts: ExpertCounts | None = None,
    ) -> Tensor:
        """Write the keys and values of all pieces, and return the final hidden states_PD of the last `wanted`
        tokens of each.

        Args:
            tiled: in tiles of a block (the pieces begin on a block's border), else token by token. The two may
                differ in a result's last bit: a position must always be computed in the same way.
            counts: of a mixture whose experts have a capacity, in all calls the same; None: no choice is dropped.
        """
        device, size = self.like.device, cache.block_tokens
        read = [
            (t, i, p.table[i // size], i % size, p.slot)
            for p in pieces
            for t, i in zip(p.tokens, _span(p), strict=True)
        ]
        # One tensor: a copy to a GPU each would take longer than the rest.
        tokens, positions, blocks, offsets, slots = torch.tensor(read).t().contiguous().to(device)
        borders = cache.plan_borders([p.table for p in pieces], [_span(p) for p in pieces])
        groups = self._groups(pieces, cache, tiled)
        counted = None
        if counts is not None:
            lengths, fresh = [len(p.tokens) for p in pieces], [p.slot for p in pieces if p.start == 0]
            counted = counts.follow(lengths, fresh, positions, slots)
        x_ND = self.model.embedding(tokens)
        rotation = self._rotary(positions, like=x_ND)
        for layer, block in enumerate(self._blocks):
            q_NHS, k_NGS, v_NGS = block.project(x_ND, rotation, tiled)
            cache.write(layer, blocks, offsets, k_NGS, v_NGS, borders)
            mixed = [_mix(q_NHS, group, cache, layer) for group in groups]
            mixed_ND = (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).to(x_ND.dtype)
            x_ND = block.finish(x_ND, mixed_ND, tiled, None if counted is None else counted.of(layer))
        stops = accumulate(len(p.tokens) for p in pieces)
        ends = [row for p, stop in zip(pieces, stops, strict=True) for row in range(stop - p.wanted, stop)]
        normed: Tensor = self.model.final_norm(x_ND.index_select(0, torch.tensor(ends, device=device)))
        return normed

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits_NV, the width padded to a multiple of VOCAB_STEP with -inf."""
        logits_NV = self._unembedding(hidden_ND, False).float()
        logits_NV[:, self.config.vocab_size :] = float("-inf")
        return logits_NV

    def _groups(self, pieces: Sequence[TokenSpan], cache: DecodeState, tiled: bool) -> list[_Group]:
        """The pieces cut into tiles, as many to a group as GROUP_NUMBERS allows."""
        block_tokens, heads = cache.block_tokens, self.config.n_heads
        queries = block_tokens if tiled else 1
        groups: list[_Group] = []
        some: list[tuple[TokenSpan, int]] = []
        numbers = row = 0
        for piece in pieces:
            several = len(piece.tokens) > 1
            for at in range(piece.start, piece.start + len(piece.tokens), queries):
                more = cache.tile_numbers(queries, heads, at // block_tokens + 1, several)
                if some and numbers + more > GROUP_NUMBERS:
                    groups.append(self._group(some, row, queries, cache))
                    row, some, numbers = groups[-1].rows.stop, [], 0
                some.append((piece, at))
                numbers += more
        return [*groups, self._group(some, row, queries, cache)]

    def _group(
        self, tiles: list[tuple[TokenSpan, int]], row: int, queries: int, cache: DecodeState
    ) -> _Group:
        """`row` is that of the first tile's first token. A tile that is not full repeats its last token."""
        device = self.like.device
        starts_T1 = torch.tensor([[at] for _, at in tiles])
        counts_T1 = torch.tensor([[min(queries, p.start + len(p.tokens) - at)] for p, at in tiles])
        place_Q = torch.arange(queries)
        offsets_TQ = torch.minimum(place_Q, counts_T1 - 1)
        take_TQ = counts_T1.cumsum(0) - counts_T1 + offsets_TQ
        give = (place_Q < counts_T1).flatten().nonzero().squeeze(1)
        plan = cache.plan([p.table for p, _ in tiles], starts_T1 + offsets_TQ)
        rows = slice(row, row + len(give))
        return _Group(plan, rows, queries, take_TQ.flatten().to(device), give.to(device))


def _span(piece: TokenSpan) -> range:
    return range(piece.start, piece.start + len(piece.tokens))


def _mix(q_NGES: Tensor, group: _Group, cache: DecodeState, layer: int) -> Tensor:
    """The attention's output of a group's rows, (rows, H * S)."""
    q_NGES = q_NGES[group.rows]
    if group.queries == 1:
        return cache.attend(q_NGES.unsqueeze(1), layer, group.plan).flatten(1)
    q_TQGES = torch.unflatten(q_NGES.index_select(0, group.take), 0, (-1, group.queries))
    output_TQGES = cache.attend(q_TQGES, layer, group.plan)
    return output_TQGES.flatten(0, 1).flatten(1).index_select(0, group.give)


class _LaidBlock:
    """A block's products in their kernels' layouts."""

    def __init__(self, block: Block, layout: Layout) -> None:
        self._block = block
        groups = groups_of(block)
        self._qkv, self._output = layout.lay(next(groups)), layout.lay(next(groups))
        self._feed_forward = lay_feed_forward(block.feed_forward, [layout.lay(group) for group in groups])

    def project(
        self, x_ND: Tensor, rotation: tuple[Tensor, Tensor], tiled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(q_NGES, k_NGS, v_NGS), turned to their positions."""
        a = self._block.attention
        heads = torch.unflatten(self._qkv(self._block.attention_norm(x_ND), tiled), -1, (-1, a.size))
        q_NHS, k_NGS, v_NGS = torch.split(heads, [a.heads, a.kv_heads, a.kv_heads], dim=1)
        if isinstance(a.query_norm, nn.Identity):
            turned = rotate(heads[:, : a.heads + a.kv_heads], *rotation)
        else:
            turned = rotate(torch.cat((a.query_norm(q_NHS), a.key_norm(k_NGS)), 1), *rotation)
        q_NHS, k_NGS = torch.split(turned, [a.heads, a.kv_heads], dim=1)
        return torch.unflatten(q_NHS, 1, (a.kv_heads, -1)), k_NGS, v_NGS

    def finish(self, x_ND: Tensor, mixed_ND: Tensor, tiled: bool, keep: Keep | None) -> Tensor:
        """The residual stream after the block, from the one before and the attention's mixture of values."""
        x_ND = self._output(mixed_ND, tiled).add_(x_ND)
        return self._feed_forward(self._block.feed_forward_norm(x_ND), tiled, keep).add_(x_ND)


def _outline_of(model: Transformer) -> Transformer:
    """The model without its numbers."""
    tensors = (*model.parameters(), *model.buffers())
    without = {
        id(t): nn.Parameter(t.to("meta"), t.requires_grad) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in tensors
    }
    return copy.deepcopy(model, without)
