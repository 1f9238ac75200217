"""What a kind of attention says of itself, without a tensor. Its fields are its options, under `model.attention`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from escala.schema.base import Strict
from escala.schema.kinds import Kinds, KindSection


class FeaturesConfig(Strict):
    """`model.features`: phi, whose products stand for the exponential kernel (docs/theory A.4, A.10)."""

    kind: Literal["positive", "trigonometric", "learned"] = Field(
        "positive", description="random and positive, random cosines and sines, or learned (Hedgehog)"
    )
    count: int = Field(256, gt=0, description="width of phi; trigonometric and learned use half as many rows")
    seed: int = Field(0, ge=0, description="of the random rows")

    @model_validator(mode="after")
    def _whole_rows(self) -> FeaturesConfig:
        if self.kind != "positive" and self.count % 2:
            raise ValueError(f"count {self.count} is odd: features of kind {self.kind} come in pairs")
        return self

    @property
    def rows(self) -> int:
        """R, rows of the projection."""
        return self.count if self.kind == "positive" else self.count // 2

    @property
    def is_signed(self) -> bool:
        """Whether a product of two phi may be 0 or negative."""
        return self.kind == "trigonometric"

    def parameters(self, heads: int, head_size: int) -> int:
        """Weights of the rows of all `heads`, where they are learned."""
        return heads * self.rows * head_size if self.kind == "learned" else 0


FP32_BYTES = 4


class ModelShape(Protocol):
    """What a kind is told of its model (`escala.schema.ModelConfig`)."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def max_context_tokens(self) -> int: ...
    @property
    def window_tokens(self) -> int | None: ...
    @property
    def features(self) -> FeaturesConfig | None: ...


class AttentionKind(KindSection):
    """One kind of attention, with its options. Projections, RoPE and norms are the model's and counted there.

    Attributes:
        window_tokens: what `model.window_tokens` is where it is left out; None: the kind has no window.
        features: what `model.features` is where it is left out; None: the kind has no features.
        has_far_part: its queries see the keys beyond their window, too, by an approximation.
    """

    window_tokens: ClassVar[int | None] = None
    features: ClassVar[FeaturesConfig | None] = None
    has_far_part: ClassVar[bool] = False

    def with_window(self) -> AttentionKind:
        """What the kind's name means in a model that states window_tokens."""
        return self

    def check(self, model: ModelShape) -> None:
        """Raise ValueError where the options and the model do not fit together."""
        if model.window_tokens is not None and self.window_tokens is None:
            raise ValueError(f"attention {self.kind} has no window_tokens: leave it out")
        if model.features is not None and self.features is None:
            raise ValueError(f"attention {self.kind} has no features: leave it out")

    def parameters(self, model: ModelShape) -> int:
        """Parameters of one layer beside the projections: they are trained, checkpointed and gathered by ZeRO as any
        other, which is all that the kind adds to communication (docs/theory A.7).
        """
        return 0

    @abstractmethod
    def flops(self, model: ModelShape, context_tokens: int) -> float:
        """Forward FLOPs per token of all layers, on average over a causal context: what T adds to the cost of a token,
        chi(T) - 1 = flops / (2 N) (docs/theory D.2).
        """

    @abstractmethod
    def saved_elements(self, model: ModelShape, element_bytes: int = FP32_BYTES) -> int:
        """Elements of `element_bytes` bytes per token and layer that its forward pass keeps for the backward pass:
        queries, keys, values and output, and what it makes besides, some of it in fp32 whatever the model's precision.
        """

    @abstractmethod
    def state_elements(self, model: ModelShape, tokens: int, element_bytes: int = FP32_BYTES) -> int:
        """Elements of `element_bytes` bytes of all layers that generation keeps of a sequence of `tokens` tokens."""

    @abstractmethod
    def block_bytes(self, model: ModelShape, block_tokens: int, width: int) -> int:
        """Bytes of all layers in one block of generation's cache, of `block_tokens` tokens.

        Args:
            width: bytes of an element of the model; what is summed over blocks has four at least.
        """

    def block_tokens(self, model: ModelShape) -> int | None:
        """Tokens that a block of generation's cache must have; None: any number."""
        return None

    def live_blocks(self, model: ModelShape, block_tokens: int) -> int | None:
        """How many last blocks generation needs of a sequence, the next token's own included; None: all."""
        return None

    def unexportable(self, model: ModelShape) -> str | None:
        """Why Hugging Face's formats cannot express the model; None: they can."""
        return f"no class of theirs computes attention {self.kind}"


KINDS = Kinds[AttentionKind](default="exact")
AttentionSection = Annotated[AttentionKind, KINDS]
"""`model.attention`: the name of a kind, or a section of `kind` and its options."""
