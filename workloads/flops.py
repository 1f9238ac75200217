"""What a model holds and what a token costs, counted from its configuration (no torch).

Sources: SPEC.md D.2; Kaplan et al. 2020, table 1 (parameters, forward = 2N plus attention); Chowdhery et al.
2022 (PaLM), appendix B (6N + 12 L H Q T for full attention; causal attention needs half of that).
"""

from __future__ import annotations

from dataclasses import dataclass

from workloads.config import ModelConfig

TRAINING_PER_FORWARD = 3  # forward once; backward twice that (Kaplan et al. 2020, section 2.1)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model. For a dense model n_active = n_total."""

    n_total: int  # every parameter, the embedding once when tied
    n_active: int  # those that one token passes through
    n_non_embedding: int  # n_total less the embedding and the unembedding


@dataclass(frozen=True)
class FlopsPerToken:
    """Training FLOPs (forward and backward) of one token, by term; recomputation is not counted."""

    matmul: float  # the blocks' weight matrices: 6 per weight
    logits: float  # the product with the unembedding: 6 V d; looking a token up costs none
    attention: float  # scores and weighted values, causal
    total: float


def _matrix_parameters(config: ModelConfig) -> int:
    """Weights of all blocks' matrices."""
    d, size = config.d_model, config.head_size
    attention = 2 * d * config.n_heads * size + 2 * d * config.kv_heads * size
    return config.n_layers * (attention + 3 * d * config.ff_size)


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Exact counts, equal to the built model's (Kaplan et al. 2020, table 1, with SwiGLU, GQA and norms)."""
    norms = 2 * config.d_model + (2 * config.head_size if config.qk_norm else 0)
    blocks = _matrix_parameters(config) + config.n_layers * norms + config.d_model
    embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    return ParameterCounts(blocks + embeddings, blocks + embeddings, blocks)


def mean_keys(context_tokens: int, window_tokens: int | None = None) -> float:
    """Keys that a query of a causal context meets on average: T/2; with a window W < T, W - W^2/(2T).

    The continuous form, as in SPEC.md D.2 (chi = 1 + L H d_h T/N); the exact sum has half a key more.
    """
    window = min(context_tokens, window_tokens or context_tokens)
    return window - window * window / (2 * context_tokens)


def flops_per_token(config: ModelConfig, context_tokens: int) -> FlopsPerToken:
    """Training FLOPs per token at a context of `context_tokens` (SPEC.md D.2; PaLM appendix B, halved).

    Attention, per layer, head and key: 2 d_h for the score and 2 d_h for the value, forward; so 6 L H d_h T
    in training. A window saturates it. Norms, RoPE, softmax and the optimiser are not counted.
    """
    matmul = 2.0 * _matrix_parameters(config)
    logits = 2.0 * config.vocab_size * config.d_model
    keys = mean_keys(context_tokens, config.window_tokens)
    attention = 4.0 * config.n_layers * config.n_heads * config.head_size * keys
    terms = [TRAINING_PER_FORWARD * term for term in (matmul, logits, attention)]
    return FlopsPerToken(*terms, total=sum(terms))
