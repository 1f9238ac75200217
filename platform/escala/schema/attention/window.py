"""Exact causal attention over a window of the last keys (docs/theory A.6)."""

from __future__ import annotations

from typing import ClassVar, Literal

from escala.schema.attention.exact import kept_for_backward, keys_and_values, mean_keys
from escala.schema.attention.kind import FP32_BYTES, KINDS, AttentionKind, ModelShape

WINDOW_TOKENS = 256
"""Default: the least of docs/theory D.9's advice, at which far recall is already the far part's."""


@KINDS.add
class WindowAttention(AttentionKind):
    """softmax(q k^T / sqrt(d_h)) v over the last `model.window_tokens` keys: linear in T."""

    kind: Literal["window"] = "window"
    window_tokens: ClassVar[int | None] = WINDOW_TOKENS

    def flops(self, model: ModelShape, context_tokens: int) -> float:
        """Per layer, head and key 4 d_h, as exact: beyond the window it does not grow."""
        keys = mean_keys(context_tokens, model.window_tokens)
        return 4.0 * model.n_layers * model.n_heads * model.head_size * keys

    def saved_elements(self, model: ModelShape, element_bytes: int = FP32_BYTES) -> int:
        """As exact, with the output and a log-sum-exp a head in fp32 besides: scores are made again."""
        return kept_for_backward(model) + kept_of_local(model, element_bytes)

    def state_elements(self, model: ModelShape, tokens: int, element_bytes: int = FP32_BYTES) -> int:
        """Keys and values of the window."""
        return keys_and_values(model, min(tokens, model.window_tokens or tokens))

    def block_bytes(self, model: ModelShape, block_tokens: int, width: int) -> int:
        """Keys and values."""
        return keys_and_values(model, block_tokens) * width

    def live_blocks(self, model: ModelShape, block_tokens: int) -> int | None:
        """The window's, which may begin at the end of a block."""
        return 1 + -(-((model.window_tokens or WINDOW_TOKENS) - 1) // block_tokens)

    def unexportable(self, model: ModelShape) -> str | None:
        """Nothing; `escala.schema.architectures` knows which class has a place for a window."""
        return None


def kept_of_local(model: ModelShape, element_bytes: int) -> int:
    """Per token and layer: the exact part's output and its log-sum-exp, in fp32."""
    return FP32_BYTES // element_bytes * model.n_heads * (model.head_size + 1)
