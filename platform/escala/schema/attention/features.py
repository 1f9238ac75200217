"""Linear attention: phi(q)^T sum phi(k) [v, 1]^T over all past keys (docs/theory A.4, A.10)."""

from __future__ import annotations

from typing import ClassVar, Literal

from escala.schema.attention.exact import mean_keys, sum_width
from escala.schema.attention.kind import FP32_BYTES, KINDS, AttentionKind, FeaturesConfig, ModelShape

CHUNK_TOKENS = 128
"""Tokens whose products with each other are taken directly; what is before them comes from the state."""


@KINDS.add
class FeaturesAttention(AttentionKind):
    """softmax's kernel replaced by phi(q) phi(k) (`model.features`), q and k at unit norm times a learned temperature:
    linear in T, with a constant state.
    """

    kind: Literal["features"] = "features"
    features: ClassVar[FeaturesConfig | None] = FeaturesConfig()

    def parameters(self, model: ModelShape) -> int:
        """A temperature a key/value head, and learned rows."""
        return model.kv_heads + features_of(model).parameters(model.kv_heads, model.head_size)

    def flops(self, model: ModelShape, context_tokens: int) -> float:
        """Per layer: phi of all queries and keys; the products within a chunk; beyond the first chunk, the state's."""
        phi, state = feature_flops(model)
        near = 2.0 * model.n_heads * (features_of(model).count + model.head_size)
        within = near * mean_keys(min(context_tokens, CHUNK_TOKENS))
        beyond = max(0.0, 1 - CHUNK_TOKENS / context_tokens)
        return model.n_layers * (phi + within + beyond * state)

    def saved_elements(self, model: ModelShape, element_bytes: int = FP32_BYTES) -> int:
        """Values and output; in fp32 queries and keys as they come, at unit norm and scaled, sums, a state a chunk. phi
        is made again.
        """
        size, heads = model.head_size, model.n_heads + model.kv_heads
        wide = 3 * heads * size + kept_of_sums(model) + -(-sums_of_features(model) // CHUNK_TOKENS)
        return heads * size + FP32_BYTES // element_bytes * wide

    def state_elements(self, model: ModelShape, tokens: int, element_bytes: int = FP32_BYTES) -> int:
        """The chunk's values, its keys' phi and the state, the last two in fp32: constant."""
        own = min(tokens, CHUNK_TOKENS) * model.kv_heads
        wide = own * features_of(model).count + sums_of_features(model)
        return model.n_layers * (own * model.head_size + FP32_BYTES // element_bytes * wide)

    def block_bytes(self, model: ModelShape, block_tokens: int, width: int) -> int:
        """phi of the keys, values, and the state before the block."""
        phi, sums = features_of(model).count * sum_width(width), sums_of_features(model) * sum_width(width)
        own = model.kv_heads * (phi + model.head_size * width)
        return model.n_layers * (own * block_tokens + sums)

    def live_blocks(self, model: ModelShape, block_tokens: int) -> int | None:
        """The own one and that before: when the own one begins, its state is made of both."""
        return 2


def features_of(model: ModelShape) -> FeaturesConfig:
    """`model.features`, never None in a checked model that has them."""
    return model.features or FeaturesConfig()


def feature_flops(model: ModelShape) -> tuple[float, float]:
    """(phi of a query and a key, state's update and reading) of one token and layer, over its heads."""
    features, heads = features_of(model), model.n_heads + model.kv_heads
    phi = 2.0 * features.rows * model.head_size * heads
    return phi, 2.0 * features.count * (model.head_size + 1) * heads


def sums_of_features(model: ModelShape) -> int:
    """Numbers of one layer's state, sum phi(k) [v, 1]."""
    return model.kv_heads * features_of(model).count * (model.head_size + 1)


def kept_of_sums(model: ModelShape) -> int:
    """Per token and layer, in fp32: numerators and denominators of queries, norms of queries and keys."""
    return model.n_heads * (model.head_size + 2) + 2 * (model.n_heads + model.kv_heads)
