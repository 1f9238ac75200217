"""Linear attention by features (docs/theory A.4, A.10): phi(q)^T sum phi(k) [v, 1]^T.

Positive and trigonometric features: Choromanski et al. 2021 (Performers), sections 2.3 and 2.4; learned ones: Zhang et
al. 2024 (Hedgehog).

Dimensions: B batch, T context, H query heads, G key/value heads, E = H / G, N = B * G, S head size, R rows of the
projection, M width of phi; `...` any leading ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escala.schema import ModelConfig
from escala.schema.attention.features import CHUNK_TOKENS, features_of
from workloads.model.attention.layout import (
    Packing,
    accumulated,
    by_tile,
    join_heads,
    of_heads,
    packing,
    split_heads,
)
from workloads.model.attention.prefix import prefix_sums
from workloads.model.attention.registry import AttentionModule
from workloads.model.attention.sums import Begun, BlockSums, begun, blocks_of

LEAST_ROWS = 4
LEAST_LENGTH = 1e-12  # as F.normalize


def feature_map(x_BTHS: Tensor, kind: str, projection_HRS: Tensor) -> Tensor:
    """phi_BTHM of x as it is: E phi(x).phi(y) = e^(x.y) for `positive` (M = R) and `trigonometric` (M = 2 R) with
    Gaussian rows; for `learned` (M = 2 R) [softmax(W x), softmax(-W x)].

    Args:
        projection_HRS: H heads' rows, or one head's for all.

    Relative variance of the positive map's product: e^z (1 - e^-z) / M with z = |x + y|^2 (docs/theory A.4). Raises
    ValueError for an unknown kind.
    """
    projected_BTHR = torch.einsum("bths,hrs->bthr", x_BTHS, projection_HRS.expand(x_BTHS.shape[2], -1, -1))
    return phi(projected_BTHR, x_BTHS, kind)


def phi(projected: Tensor, x: Tensor, kind: str, shift: Tensor | float = 0.0) -> Tensor:
    """(..., M) of x (..., S) and its products with the rows (..., R); `shift` is taken off the positive map's
    exponents.
    """
    if kind == "learned":
        return torch.cat((projected.softmax(-1), (-projected).softmax(-1)), -1)
    half_square: Tensor = torch.linalg.vecdot(x, x).unsqueeze(-1) / 2
    root = math.sqrt(projected.shape[-1])
    if kind == "positive":
        return (projected - (half_square + shift)).exp().div(root)
    if kind == "trigonometric":
        return torch.cat((projected.cos(), projected.sin()), -1).mul(half_square.exp() / root)
    raise ValueError(f"no features of kind {kind!r}: positive, trigonometric or learned")


@functools.lru_cache(16)
def random_rows(heads: int, rows: int, head_size: int, seed: int, device: torch.device) -> Tensor:
    """(heads, rows, head_size) in fp64: orthogonal blocks of Gaussian rows (Choromanski et al. 2021, section 2.4).

    Not a buffer: it follows from the configuration, and `model.to(bfloat16)` would round it.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-rows // head_size)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        directions, upper = torch.linalg.qr(draw((heads, blocks, head_size, head_size)))
        directions *= upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # else QR favours some directions
        norms = torch.linalg.vector_norm(draw((heads, blocks, head_size, head_size)), dim=-1, keepdim=True)
        drawn: Tensor = (directions * norms).flatten(1, 2)
        picked: Tensor = drawn[:, :rows]
        return picked.to(device)


@functools.lru_cache(16)
def _random_map(
    heads: int, rows: int, head_size: int, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(random_rows in `dtype`, the length of each head's longest)."""
    with torch.inference_mode(False):
        rows_HRS = random_rows(heads, rows, head_size, seed, device).to(dtype)
        return rows_HRS, torch.linalg.vector_norm(rows_HRS, dim=-1).amax(-1)


class UnitScale(nn.Module):
    """Queries and keys at unit norm times a learned temperature of each key/value head, at most 1 and 1 at the start:
    e^(x.y) then lies between 1/e and e, where features and landmarks can follow it (docs/theory A.4).

    The bound takes part in no gradient: at 1 a parameter still learns to fall, by the same gradient however ranks and
    micro-batches cut the batch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.temperature_G = nn.Parameter(torch.ones(config.kv_heads))

    def scaled(self, x_GNS: Tensor) -> Tensor:
        """Queries or keys of N positions in generation, in fp32 (fp64 for fp64)."""
        kind = accumulated(x_GNS.dtype)
        temperature_G11 = self.temperature_G.to(kind).clamp(max=1.0).view(-1, 1, 1)
        length = torch.linalg.vector_norm(x_GNS, dim=-1, keepdim=True, dtype=kind).clamp(min=LEAST_LENGTH)
        scaled: Tensor = x_GNS * (temperature_G11 / length)
        return scaled

    def least_G(self) -> Tensor:
        """What the kernel of a query and a key is at least: e^-temperature^2."""
        return (-self.temperature_G.float().clamp(max=1.0).square()).exp()

    def forward(self, q_NETS: Tensor, k_NTS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_NETS, y_NTS, temperature_N), in fp32 (fp64 for fp64)."""
        kind = accumulated(q_NETS.dtype)
        batch = len(k_NTS) // len(self.temperature_G)
        free_G = self.temperature_G.to(kind)
        temperature_G = free_G + (free_G.clamp(max=1.0) - free_G).detach()
        temperature_N = temperature_G.repeat(batch)
        x_NETS = F.normalize(q_NETS.to(kind), dim=-1) * temperature_N.view(-1, 1, 1, 1)
        y_NTS = F.normalize(k_NTS.to(kind), dim=-1) * temperature_N.view(-1, 1, 1)
        return x_NETS, y_NTS, temperature_N


class FeatureSums(nn.Module):
    """Numerators and denominators of a kernel by features, over all blocks that lie `lag` or more before a query's
    own; with `lag` 1 the earlier tokens of its own block, too.
    """

    def __init__(self, config: ModelConfig, block_tokens: int, lag: int) -> None:
        super().__init__()
        self.features, self.block_tokens, self.lag = features_of(config), block_tokens, lag
        self._shape = (config.kv_heads, self.features.rows, config.head_size)
        self.projection_GRS: nn.Parameter | None = None
        if self.features.kind == "learned":
            self.projection_GRS = nn.Parameter(torch.empty(self._shape))
            nn.init.normal_(self.projection_GRS)

    def rows(self, like: Tensor) -> Tensor:
        """The projection, (G, R, S), in the dtype and on the device of `like`."""
        if self.projection_GRS is not None:
            return self.projection_GRS.to(like.dtype)
        return _random_map(*self._shape, self.features.seed, like.device, like.dtype)[0]

    def shift_G(self, like: Tensor) -> Tensor | None:
        """What keeps the positive map's exponents at most 0: the largest |w_r|, a constant; None for other maps."""
        if self.features.kind != "positive":
            return None
        return _random_map(*self._shape, self.features.seed, like.device, like.dtype)[1]

    def mapped(self, x_GNS: Tensor) -> Tensor:
        """phi_GNM in generation, the same bits of a row whatever the others: MKL adds up products of fewer than
        LEAST_ROWS rows in another order.
        """
        rows_GRS, tokens = self.rows(x_GNS), x_GNS.shape[1]
        shift_G = self.shift_G(rows_GRS)
        x_GNS = F.pad(x_GNS, (0, 0, 0, max(0, LEAST_ROWS - tokens)))
        return _phi_of_rows(x_GNS, rows_GRS, self.features.kind, shift_G)[:, :tokens]

    def forward(
        self, x_NETS: Tensor, y_NTS: Tensor, v_NTS: Tensor, temperature_N: Tensor, packed: Packing
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(numerator_NETS, denominator_NET, log_scale_N): what was summed is e^-log_scale of the kernel; None: 0.

        A query without far keys has a denominator of 1 and a numerator of 0.
        """
        rows_GRS = self.rows(x_NETS)
        batch = len(y_NTS) // len(rows_GRS)
        shift_G = self.shift_G(rows_GRS)
        shift_N = None if shift_G is None else shift_G.repeat(batch)
        sums = prefix_sums(
            x_NETS,
            y_NTS,
            v_NTS,
            rows_GRS.repeat(batch, 1, 1),
            functools.partial(_phi_of_rows, kind=self.features.kind, shift_N=shift_N),
            packed,
            self.block_tokens,
            self.lag,
        )
        count_BT = far_keys(packed, self.block_tokens) if self.lag > 1 else packed.seen_before_BT + 1
        count_NT = of_heads(count_BT, len(y_NTS))
        numerator, denominator = sums[..., :-1], sums[..., -1]
        if self.features.is_signed:
            denominator = at_least(denominator, count_NT, temperature_N)
        denominator = denominator.masked_fill(count_NT[:, None] == 0, 1.0)
        return numerator, denominator, None if shift_N is None else 2 * shift_N


def far_keys(packed: Packing, block_tokens: int) -> Tensor:
    """Keys of its document that lie two or more blocks before a query's own, (B, T) or (1, T)."""
    position = torch.arange(packed.context_tokens, device=packed.device)
    first = position - packed.seen_before_BT
    border = (position // block_tokens - 1) * block_tokens
    return (border - first).clamp(min=0)


def at_least(denominator_NET: Tensor, count_NT: Tensor, temperature_N: Tensor) -> Tensor:
    """The denominator, not below what the kernel's own is at least: e^-temperature^2 a key. An estimate that may be 0
    or negative is no normaliser.
    """
    least_NT = count_NT * (-temperature_N.detach().square()).exp()[:, None]
    return torch.maximum(denominator_NET, least_NT[:, None])


def _phi_of_rows(x_NKS: Tensor, rows_NRS: Tensor, kind: str, shift_N: Tensor | None) -> Tensor:
    """phi_NKM."""
    shift: Tensor | float = 0.0 if shift_N is None else shift_N.view(-1, 1, 1)
    return phi(torch.bmm(x_NKS, rows_NRS.transpose(1, 2)), x_NKS, kind, shift)


class LinearAttention(AttentionModule):
    """Attention by features alone, in chunks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self.unit = UnitScale(config)
        self.sums = FeatureSums(config, CHUNK_TOKENS, lag=1)

    def prepare(self, context_tokens: int, documents_BT: Tensor | None, device: torch.device) -> Packing:
        """The documents' borders."""
        return packing(context_tokens, documents_BT, device)

    def attend(self, q_BTHS: Tensor, k_BTGS: Tensor, v_BTGS: Tensor, prepared: Packing) -> Tensor:
        """See AttentionModule."""
        q_NETS, k_NTS, v_NTS = split_heads(q_BTHS, k_BTGS, v_BTGS)
        x_NETS, y_NTS, temperature_N = self.unit(q_NETS, k_NTS)
        numerator, denominator, _ = self.sums(x_NETS, y_NTS, v_NTS, temperature_N, prepared)
        return join_heads(numerator / denominator.unsqueeze(-1), len(q_BTHS), q_BTHS.dtype)

    @classmethod
    def decode_state(
        cls, layers: Sequence[Self], blocks: int, block_tokens: int, like: Tensor
    ) -> FeatureState:
        """A state, and what is known of the keys of a block, constant for a sequence; in blocks of any size."""
        return FeatureState(layers, layers[0]._config, blocks, block_tokens, like)


@dataclass(frozen=True)
class _Tiles:
    """Of each tile its block, and which positions of it a query sees, (T, 1, 1, Q, C); keys that it sees, (T, Q)."""

    block_T: Tensor
    seen: Tensor
    count_TQ: Tensor


class FeatureState:
    """Of each block phi of its keys, their values, and the state before it."""

    def __init__(
        self,
        layers: Sequence[LinearAttention],
        config: ModelConfig,
        blocks: int,
        block_tokens: int,
        like: Tensor,
    ) -> None:
        self._layers, self.block_tokens = layers, block_tokens
        heads, size, width = config.kv_heads, config.head_size, layers[0].sums.features.count
        self._before = BlockSums(len(layers), blocks, heads, width, size, like)
        shape = (len(layers), blocks, heads, block_tokens)
        self._phi = torch.zeros((*shape, width), dtype=self._before.sums.dtype, device=like.device)
        self._values = torch.zeros((*shape, size), dtype=like.dtype, device=like.device)

    def plan_borders(self, tables: Sequence[Sequence[int]], spans: Sequence[range]) -> Begun:
        """The blocks that begin."""
        return begun(tables, spans, self.block_tokens, 1, self._phi.device)

    def tile_numbers(self, queries: int, heads: int, blocks: int, of_several: bool) -> int:
        """phi of queries, their products with a block's keys, and copies of the state and the block."""
        _, _, kv_heads, block_tokens, width = self._phi.shape
        size = self._values.shape[-1]
        copied = kv_heads * (width * (size + 1) + block_tokens * (width + size))
        return queries * heads * (width + block_tokens + 2 * size) + copied

    def write(
        self, layer: int, blocks: Tensor, offsets: Tensor, k_NGS: Tensor, v_NGS: Tensor, borders: Begun
    ) -> None:
        """phi and values of N positions; then the states of the blocks that begin."""
        core = self._layers[layer]
        phi_GNM = core.sums.mapped(core.unit.scaled(k_NGS.transpose(0, 1)))
        self._phi[layer, blocks, :, offsets] = phi_GNM.transpose(0, 1)
        self._values[layer, blocks, :, offsets] = v_NGS
        self._before.begin(
            layer,
            borders,
            lambda: (
                blocks_of(self._phi[layer], borders.joined),
                blocks_of(self._values[layer], borders.joined),
            ),
        )

    def plan(self, tables: Sequence[Sequence[int]], positions_TQ: Tensor) -> _Tiles:
        """See DecodeState."""
        size, device = self.block_tokens, self._phi.device
        place_T = positions_TQ[:, -1] // size
        block_T = torch.tensor([t[p] for t, p in zip(tables, place_T.tolist(), strict=True)])
        key_TC = place_T[:, None] * size + torch.arange(size)
        seen_TQC = key_TC[:, None] <= positions_TQ[:, :, None]
        return _Tiles(block_T.to(device), seen_TQC[:, None, None].to(device), (positions_TQ + 1).to(device))

    def attend(self, q_TQGES: Tensor, layer: int, plan: _Tiles) -> Tensor:
        """The state's sums and those of the block's own keys."""
        core = self._layers[layer]
        tiles, queries, heads, each, size = q_TQGES.shape
        q_GNS = q_TQGES.permute(2, 0, 3, 1, 4).reshape(heads, -1, size)
        phi_GNM = core.sums.mapped(core.unit.scaled(q_GNS))
        phi_NRM = by_tile(phi_GNM, tiles).flatten(0, 1)
        sums_NRV = self._before.read(layer, plan.block_T, phi_NRM)
        keys_NCM, v_NCS = (blocks_of(x[layer], plan.block_T) for x in (self._phi, self._values))
        weights_NRC = torch.bmm(phi_NRM, keys_NCM.transpose(1, 2))
        weights_NRC.view(tiles, heads, each, queries, -1).mul_(plan.seen)
        numerator_NRS = sums_NRV[..., :-1] + torch.bmm(weights_NRC, v_NCS.to(weights_NRC.dtype))
        denominator_NR = sums_NRV[..., -1] + weights_NRC.sum(-1)
        denominator = denominator_NR.view(tiles, heads, each, queries)
        if core.sums.features.is_signed:
            least = core.unit.least_G().view(-1, 1, 1) * plan.count_TQ[:, None, None]
            denominator = torch.maximum(denominator, least)
        out_TGEQS = numerator_NRS.view(tiles, heads, each, queries, size) / denominator.unsqueeze(-1)
        return out_TGEQS.permute(0, 3, 1, 2, 4)


make_attention = LinearAttention
