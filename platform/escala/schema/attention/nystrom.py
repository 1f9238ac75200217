"""Exact attention near by, landmarks of each past block far away, one normaliser (docs/theory A.5, A.7)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from escala.schema.attention.exact import keys_and_values, sum_width
from escala.schema.attention.hybrid import BlockAttention, window_of
from escala.schema.attention.kind import FP32_BYTES, KINDS, ModelShape
from escala.schema.attention.window import WINDOW_TOKENS


@KINDS.add
class NystromAttention(BlockAttention):
    """Landmarks are the tokens of a past block with the largest ridge leverage scores (Musco & Musco 2017). A query
    meets the landmarks of every past block: time grows with T^2 landmarks / S, the state with T.
    """

    kind: Literal["nystrom"] = "nystrom"
    window_tokens: ClassVar[int | None] = WINDOW_TOKENS
    landmarks: int = Field(16, gt=0, description="of each past block; S = window_tokens / 2: all its tokens")
    ridge: float = Field(0.01, ge=0, description="lambda, added to the diagonal of the landmarks' kernel")

    def check(self, model: ModelShape) -> None:
        """Raise ValueError for more landmarks than a block has tokens."""
        super().check(model)
        if self.landmarks > window_of(model) // 2:
            raise ValueError(
                f"landmarks {self.landmarks} are more than the {window_of(model) // 2} tokens of a block "
                f"(half of window_tokens {window_of(model)})"
            )

    def parameters(self, model: ModelShape) -> int:
        """A gain a head, a temperature a key/value head."""
        return model.n_heads + model.kv_heads

    def flops(self, model: ModelShape, context_tokens: int) -> float:
        """The exact part; of each past block's token the kernel with its block and with the landmarks, and their sums;
        of a query the landmarks of all blocks that are past: T / (2 S) on average, less what is near.
        """
        size, block = model.head_size, window_of(model) // 2
        share = self.far_share(model, context_tokens)
        keys = 2.0 * model.kv_heads * (block * size + self.landmarks * (2 * size + 1))
        landmarks = self.landmarks * share * share * context_tokens / (2 * block)
        queries = 2.0 * model.n_heads * landmarks * (2 * size + 1)
        return model.n_layers * (self.local_flops(model, context_tokens) + share * keys + queries)

    def saved_elements(self, model: ModelShape, element_bytes: int = FP32_BYTES) -> int:
        """Both parts; keys and values by blocks, and a block's landmarks. The rest is made again, block by block."""
        keys, block = model.kv_heads * model.head_size, window_of(model) // 2
        wide = keys + -(-self._summary(model) // block)
        return self.kept_of_both(model, element_bytes) + keys + FP32_BYTES // element_bytes * wide

    def state_elements(self, model: ModelShape, tokens: int, element_bytes: int = FP32_BYTES) -> int:
        """Keys and values of the window; the landmarks of all blocks before it."""
        blocks = -(-tokens // (window_of(model) // 2))
        near = keys_and_values(model, min(tokens, window_of(model)))
        return near + FP32_BYTES // element_bytes * model.n_layers * blocks * self._summary(model)

    def block_bytes(self, model: ModelShape, block_tokens: int, width: int) -> int:
        """Keys and values, and the landmarks of the block with their sums."""
        summary = model.n_layers * self._summary(model) * sum_width(width)
        return keys_and_values(model, block_tokens) * width + summary

    def _summary(self, model: ModelShape) -> int:
        """Numbers of the landmarks of one block and layer, and of their sums."""
        return model.kv_heads * self.landmarks * (2 * model.head_size + 1)
