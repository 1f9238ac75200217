"""Exact causal attention, of all keys or of a window of the last ones (`model.window_tokens`)."""

from __future__ import annotations

from typing import Literal

from escala.schema.attention.kind import KINDS, AttentionKind, ModelShape


@KINDS.add
class ExactAttention(AttentionKind):
    """softmax(q k^T / sqrt(d_h)) v. Its one option, `window_tokens`, stands in the model's own section."""

    kind: Literal["exact"] = "exact"

    def check(self, model: ModelShape) -> None:
        """Any window is good."""

    def flops(self, model: ModelShape, context_tokens: int) -> float:
        """Per layer, head and key 2 d_h for the score and 2 d_h for the value: 2 L H d_h T. A window saturates it."""
        keys = mean_keys(context_tokens, model.window_tokens)
        return 4.0 * model.n_layers * model.n_heads * model.head_size * keys

    def saved_elements(self, model: ModelShape) -> int:
        """Rotated queries and keys, values, the output: scores are made again (flash-attn, SDPA)."""
        return 2 * model.n_heads * model.head_size + 2 * model.kv_heads * model.head_size

    def state_elements(self, model: ModelShape, tokens: int) -> int:
        """Keys and values; those that a window has left behind are kept until the sequence ends."""
        return 2 * model.n_layers * model.kv_heads * model.head_size * tokens

    def unexportable(self, model: ModelShape) -> str | None:
        """Nothing; `escala.schema.architectures` knows which class has a place for a window."""
        return None


def mean_keys(context_tokens: int, window_tokens: int | None = None) -> float:
    """Keys that a query of a causal context meets on average: T/2; with a window W < T, W - W^2/(2T).

    The continuous form, as in docs/theory D.2 (chi = 1 + L H d_h T/N); the exact sum has half a key more.
    """
    window = min(context_tokens, window_tokens or context_tokens)
    return window - window * window / (2 * context_tokens)
