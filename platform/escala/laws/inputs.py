"""The inputs that several forms read, with their units; an input of one form alone stands in that form's file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """A column of a table of points, and a key of `Law.predict`."""

    name: str
    unit: str
    label: str  # of a plot's axis
    example: float  # what a message shows
    smallest: float | None = None  # no table of language models has less; below it the unit is another one
    record_field: str | None = None  # its name in a RunRecord, where that is another one

    @property
    def field(self) -> str:
        """Its name in a RunRecord."""
        return self.record_field or self.name

    def __str__(self) -> str:
        return f"{self.name} ({self.unit})"


# Kaplan et al. (2020) begin at 768 non-embedding parameters.
N_ACTIVE = Input("n_active", "parameters that a token uses", "N active", 1e9, 1e3)
N_TOTAL = Input("n_total", "parameters", "N total", 1e9, 1e3)
N_NON_EMBEDDING = Input("n_non_embedding", "parameters without embeddings", "N non-embedding", 1e9, 10.0)
SIZE = Input("size", "parameters", "N", 1e9)  # stands for the one of the three that a law is fitted on
TOKENS = Input("tokens", "training tokens", "D, tokens", 2e10, 1e3, "train_tokens")
CONTEXT_TOKENS = Input("context_tokens", "tokens of context", "T, tokens of context", 2048, 1.0)
COMPUTE_FLOPS = Input("compute_flops", "FLOPs", "C, FLOPs", 1e21, 6e6)  # 6 N D of the two smallest

COMMON = (N_ACTIVE, N_TOTAL, N_NON_EMBEDDING, TOKENS, CONTEXT_TOKENS, COMPUTE_FLOPS)
SIZES = (N_ACTIVE.name, N_TOTAL.name, N_NON_EMBEDDING.name)
