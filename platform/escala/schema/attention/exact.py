"""Exact causal attention, of all keys, and what the other kinds share with it."""

from __future__ import annotations

from typing import Literal

from escala.schema.attention.kind import FP32_BYTES, KINDS, AttentionKind, ModelShape


@KINDS.add
class ExactAttention(AttentionKind):
    """softmax(q k^T / sqrt(d_h)) v. With `model.window_tokens`, as imported models have it, it is `window`."""

    kind: Literal["exact"] = "exact"

    def with_window(self) -> AttentionKind:
        """The kind `window`."""
        return KINDS["window"](kind="window")

    def flops(self, model: ModelShape, context_tokens: int) -> float:
        """Per layer, head and key 2 d_h for the score and 2 d_h for the value: 2 L H d_h T."""
        return (
            4.0
            * model.n_layers
            * model.n_heads
            * model.head_size
            * mean_keys(context_tokens, model.window_tokens)
        )

    def saved_elements(self, model: ModelShape, element_bytes: int = FP32_BYTES) -> int:
        """Rotated queries and keys, values, the output: scores are made again (flash-attn, SDPA)."""
        return kept_for_backward(model)

    def state_elements(self, model: ModelShape, tokens: int, element_bytes: int = FP32_BYTES) -> int:
        """Keys and values."""
        return keys_and_values(model, tokens)

    def block_bytes(self, model: ModelShape, block_tokens: int, width: int) -> int:
        """Keys and values."""
        return keys_and_values(model, block_tokens) * width

    def unexportable(self, model: ModelShape) -> str | None:
        """Nothing."""
        return None


def mean_keys(context_tokens: int, window_tokens: int | None = None) -> float:
    """Keys that a query of a causal context meets on average: T/2; with a window W < T, W - W^2/(2T).

    The continuous form, as in docs/theory D.2 (chi = 1 + L H d_h T/N); the exact sum has half a key more.
    """
    window = min(context_tokens, window_tokens or context_tokens)
    return window - window * window / (2 * context_tokens)


def kept_for_backward(model: ModelShape) -> int:
    """Per token and layer: rotated queries and keys, values, the output."""
    return 2 * model.n_heads * model.head_size + 2 * model.kv_heads * model.head_size


def sum_width(width: int) -> int:
    """Bytes of an element that is summed over tokens, in a model of `width` bytes an element: fp32, or fp64."""
    return max(4, width)


def keys_and_values(model: ModelShape, tokens: int) -> int:
    """Elements of all layers."""
    return 2 * model.n_layers * model.kv_heads * model.head_size * tokens
