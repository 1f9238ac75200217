"""What a kind of attention says of itself, without a tensor. Its fields are its options, under `model.attention`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Protocol

from escala.schema.kinds import Kinds, KindSection


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


class AttentionKind(KindSection):
    """One kind of attention, with its options. Projections, RoPE and norms are the model's and counted there."""

    def check(self, model: ModelShape) -> None:
        """Raise ValueError where the options and the model do not fit together."""
        if model.window_tokens is not None:
            raise ValueError(f"attention {self.kind} has no window_tokens: leave it out")

    @abstractmethod
    def flops(self, model: ModelShape, context_tokens: int) -> float:
        """Forward FLOPs per token of all layers, on average over a causal context: what T adds to the cost of a token,
        chi(T) - 1 = flops / (2 N) (docs/theory D.2).
        """

    @abstractmethod
    def saved_elements(self, model: ModelShape) -> int:
        """Elements per token and layer that its forward pass keeps for the backward pass: queries, keys, values and
        output, and what it makes besides.
        """

    @abstractmethod
    def state_elements(self, model: ModelShape, tokens: int) -> int:
        """Elements of all layers that generation keeps of `tokens` successive tokens of a sequence."""

    def unexportable(self, model: ModelShape) -> str | None:
        """Why Hugging Face's formats cannot express the model; None: they can."""
        return f"no class of theirs computes attention {self.kind}"


KINDS = Kinds[AttentionKind](default="exact")
AttentionSection = Annotated[AttentionKind, KINDS]
"""`model.attention`: the name of a kind, or a section of `kind` and its options."""
