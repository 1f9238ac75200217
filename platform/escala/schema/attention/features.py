"""Linear attention: phi(q)^T sum phi(k) [v, 1]^T over all past keys (docs/theory A.4, A.10)."""

from __future__ import annotations

from typing import ClassVar, Literal

from escala.schema.attention.exact import kept_for_backward, mean_keys
from escala.schema.attention.kind import KINDS, AttentionKind, FeaturesConfig, ModelShape

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

    def saved_elements(self, model: ModelShape) -> int:
        """Queries and keys before and at unit norm, values, output; a state of fp32 a chunk. phi is made again."""
        return kept_for_backward(model) + saved_by_features(model, CHUNK_TOKENS)

    def state_elements(self, model: ModelShape, tokens: int) -> int:
        """The chunk's keys' phi and values, and the state: constant, two elements each of fp32."""
        return self.block_elements(model, min(tokens, CHUNK_TOKENS))

    def block_elements(self, model: ModelShape, block_tokens: int) -> int:
        """phi of the keys, in fp32, values, and the state before the block."""
        own = 2 * features_of(model).count + model.head_size
        return model.n_layers * (model.kv_heads * own * block_tokens + state_of_features(model))

    def block_tokens(self, model: ModelShape) -> int | None:
        """A chunk."""
        return CHUNK_TOKENS

    def live_tokens(self, model: ModelShape) -> int | None:
        """A chunk before the token's own: its end is where the own one's state is made."""
        return 2 * CHUNK_TOKENS


def features_of(model: ModelShape) -> FeaturesConfig:
    """`model.features`, never None in a checked model that has them."""
    return model.features or FeaturesConfig()


def feature_flops(model: ModelShape) -> tuple[float, float]:
    """(phi of a query and a key, state's update and reading) of one token and layer, over its heads."""
    features, heads = features_of(model), model.n_heads + model.kv_heads
    phi = 2.0 * features.rows * model.head_size * heads
    return phi, 2.0 * features.count * (model.head_size + 1) * heads


def state_of_features(model: ModelShape) -> int:
    """Elements of one layer's state, sum phi(k) [v, 1]: fp32, so two of a model in half precision."""
    return 2 * model.kv_heads * features_of(model).count * (model.head_size + 1)


def saved_by_features(model: ModelShape, block_tokens: int) -> int:
    """Per token and layer: queries and keys at unit norm with what makes them so, a numerator and a denominator a
    query, and a state a block.
    """
    heads = model.n_heads + model.kv_heads
    sums = model.n_heads * (model.head_size + 2)
    return 2 * heads * model.head_size + sums + -(-state_of_features(model) // block_tokens)
