"""Exact attention near by, features far away, one normaliser (docs/theory A.7)."""

from __future__ import annotations

from typing import ClassVar, Literal

from escala.schema.attention.exact import kept_for_backward, keys_and_values, mean_keys, sum_width
from escala.schema.attention.features import (
    feature_flops,
    features_of,
    kept_of_sums,
    sums_of_features,
)
from escala.schema.attention.kind import FP32_BYTES, KINDS, AttentionKind, FeaturesConfig, ModelShape
from escala.schema.attention.window import WINDOW_TOKENS, kept_of_local

JOINING = 8  # numbers a query and head: log-sum-exps, weights and masks of one normaliser


class BlockAttention(AttentionKind):
    """Exact attention over a block of S = window_tokens / 2 tokens and the one before; beyond them a far part."""

    window_tokens: ClassVar[int | None] = WINDOW_TOKENS
    has_far_part: ClassVar[bool] = True

    def check(self, model: ModelShape) -> None:
        """Raise ValueError for a window that is no two blocks."""
        super().check(model)
        if window_of(model) % 2:
            raise ValueError(f"window_tokens {model.window_tokens} is odd: attention {self.kind} halves it")

    def local_flops(self, model: ModelShape, context_tokens: int) -> float:
        """Of the exact part of one layer."""
        return 4.0 * model.n_heads * model.head_size * mean_local_keys(context_tokens, window_of(model))

    def block_tokens(self, model: ModelShape) -> int | None:
        """S."""
        return window_of(model) // 2

    def kept_of_both(self, model: ModelShape, element_bytes: int) -> int:
        """Per token and layer: what the exact part keeps; in fp32 queries and keys at unit norm and scaled (and as they
        come, where they are of less), sums, and what joins the parts.
        """
        size, heads = model.head_size, model.n_heads + model.kv_heads
        copies = 2 if element_bytes == FP32_BYTES else 3
        wide = copies * heads * size + kept_of_sums(model) + JOINING * model.n_heads
        local = kept_for_backward(model) + kept_of_local(model, element_bytes)
        return local + FP32_BYTES // element_bytes * wide

    def far_share(self, model: ModelShape, context_tokens: int) -> float:
        """The share of queries that have a far part, which is that of the keys that are in one."""
        return max(0.0, 1 - window_of(model) / context_tokens)


@KINDS.add
class HybridAttention(BlockAttention):
    """The far part by features (`model.features`), q and k at unit norm there: linear in T, with a constant state."""

    kind: Literal["hybrid"] = "hybrid"
    features: ClassVar[FeaturesConfig | None] = FeaturesConfig()

    def parameters(self, model: ModelShape) -> int:
        """A gain a head, a temperature a key/value head, and learned rows."""
        learned = features_of(model).parameters(model.kv_heads, model.head_size)
        return model.n_heads + model.kv_heads + learned

    def flops(self, model: ModelShape, context_tokens: int) -> float:
        """The exact part, and beyond the first two blocks phi and the state."""
        far = self.far_share(model, context_tokens) * sum(feature_flops(model))
        return model.n_layers * (self.local_flops(model, context_tokens) + far)

    def saved_elements(self, model: ModelShape, element_bytes: int = FP32_BYTES) -> int:
        """Both parts, and a state a block, in fp32. phi is made again."""
        state = -(-sums_of_features(model) // (window_of(model) // 2))
        return self.kept_of_both(model, element_bytes) + FP32_BYTES // element_bytes * state

    def state_elements(self, model: ModelShape, tokens: int, element_bytes: int = FP32_BYTES) -> int:
        """Keys and values of the window, and the state in fp32: constant."""
        near = keys_and_values(model, min(tokens, window_of(model)))
        return near + FP32_BYTES // element_bytes * model.n_layers * sums_of_features(model)

    def block_bytes(self, model: ModelShape, block_tokens: int, width: int) -> int:
        """Keys and values, and the state before the block."""
        sums = model.n_layers * sums_of_features(model) * sum_width(width)
        return keys_and_values(model, block_tokens) * width + sums

    def live_blocks(self, model: ModelShape, block_tokens: int) -> int | None:
        """The own one and the two before: when the own one begins, the first joins its state."""
        return 3


def window_of(model: ModelShape) -> int:
    """`model.window_tokens`, never None in a checked model that has one."""
    return model.window_tokens or WINDOW_TOKENS


def mean_local_keys(context_tokens: int, window_tokens: int) -> float:
    """Keys of its block and the one before that a query meets on average: T/2 up to two blocks, then 3/2 S - S^2/T.

    The continuous form, as `mean_keys`; within a block that is not whole it counts the mean, too.
    """
    if context_tokens <= window_tokens:
        return mean_keys(context_tokens)
    block = window_tokens / 2
    return 1.5 * block - block * block / context_tokens
