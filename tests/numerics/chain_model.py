"""A model whose next token follows from the last one alone, for tests of what is done with tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from escala.schema import ModelConfig
from workloads.model.transformer import Transformer


def chain(vocab_size: int, steps: Mapping[int, int], otherwise: int = 0) -> Transformer:
    """After token t comes steps[t], or `otherwise`, with probability near 1."""
    width = -(-vocab_size // 8) * 8
    config = ModelConfig(
        vocab_size=vocab_size,
        n_layers=1,
        d_model=width,
        n_heads=4,
        d_ff=8,
        max_context_tokens=128,
        tie_embeddings=False,
    )
    model = Transformer(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "output" in name or "down" in name:
                weight.zero_()
        model.embedding.weight.copy_(torch.eye(vocab_size, width))
        after_VV = torch.zeros(vocab_size, width)
        for token in range(vocab_size):
            after_VV[steps.get(token, otherwise), token] = 60 / width**0.5
        assert model.unembedding is not None
        model.unembedding.weight.copy_(after_VV)
    return model


def path(*tokens: int) -> dict[int, int]:
    """Steps from each token to the next."""
    return dict(pairwise(tokens))


def ids_of(vocabulary: Mapping[str, int], *tokens: str) -> Sequence[int]:
    """Token ids."""
    return [vocabulary[token] for token in tokens]
