"""What a model holds and what a token costs, counted from its configuration (no torch).

Sources: docs/theory D.2; Kaplan et al. 2020, table 1 (parameters, forward = 2N plus attention); Chowdhery et al.
2022 (PaLM), appendix B (6N + 12 L H Q T for full attention; causal attention needs half of that).
"""

from __future__ import annotations

from dataclasses import dataclass

from escala.schema.attention.kind import FP32_BYTES
from escala.schema.model import ModelConfig
from escala.schema.training import LoraConfig, TrainedConfig

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
    attention: float  # what grows with the context: scores and weighted values
    total: float


def _matrix_parameters(config: ModelConfig, experts: float | None = None) -> float:
    """Weights of all blocks' matrices, `experts` of each mixture's counted; None: all of them."""
    d, size = config.d_model, config.head_size
    attention = 2 * d * config.n_heads * size + 2 * d * config.kv_heads * size
    feed_forward = 3.0 * d * config.ff_size
    total = config.n_layers * (attention + feed_forward)
    if config.moe is not None:
        counted = config.moe.experts if experts is None else experts
        mixture = d * config.moe.experts + 3 * d * config.expert_size * (counted + config.moe.shared_experts)
        total += mixture_layers(config) * (mixture - feed_forward)
    return total


def mixture_layers(config: ModelConfig) -> int:
    """Layers that are a mixture of experts."""
    return 0 if config.moe is None else config.n_layers // config.moe.every


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Exact counts, equal to the built model's (Kaplan et al. 2020, table 1, with SwiGLU, GQA and norms). Of a mixture
    of experts one token passes through k, the shared ones and the whole router (docs/theory B.6).
    """
    norms = 2 * config.d_model + (2 * config.head_size if config.qk_norm else 0)
    rest = config.n_layers * (norms + config.attention.parameters(config)) + config.d_model
    chosen = None if config.moe is None else config.moe.chosen
    blocks, active = (round(_matrix_parameters(config, e)) + rest for e in (None, chosen))
    embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    return ParameterCounts(blocks + embeddings, active + embeddings, blocks)


def flops_per_token(config: ModelConfig, context_tokens: int) -> FlopsPerToken:
    """Training FLOPs per token at a context of `context_tokens` (docs/theory D.2; PaLM appendix B, halved).

    The attention's kind says what it costs; norms, RoPE, softmax and the optimiser are not counted. A mixture computes
    as many experts a token as it has slots for: k; fewer at a capacity factor below 1; all E where it trains soft to
    hard.
    """
    matmul = 2.0 * _matrix_parameters(config, _computed_experts(config))
    logits = 2.0 * config.vocab_size * config.d_model
    attention = config.attention.flops(config, context_tokens)
    matmul, logits, attention = (TRAINING_PER_FORWARD * term for term in (matmul, logits, attention))
    return FlopsPerToken(matmul, logits, attention, total=sum((matmul, logits, attention)))


def chi(config: ModelConfig, context_tokens: int) -> float:
    """What a token costs at a context of `context_tokens`, relative to one without attention (docs/theory D.2)."""
    flops = flops_per_token(config, context_tokens)
    return flops.total / (flops.matmul + flops.logits)


def lora_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Of the deltas of all blocks: rank * (inputs + outputs) a matrix."""
    d, size = config.d_model, config.head_size
    shapes = {
        "query": (d, config.n_heads * size),
        "key": (d, config.kv_heads * size),
        "value": (d, config.kv_heads * size),
        "output": (config.n_heads * size, d),
        "gate": (d, config.ff_size),
        "up": (d, config.ff_size),
        "down": (config.ff_size, d),
    }
    return config.n_layers * lora.rank * sum(sum(shapes[target]) for target in lora.targets)


def attention_parameters(config: ModelConfig) -> int:
    """Of all layers' attention: projections, norms of heads, and the kind's own."""
    norms = 2 * config.head_size if config.qk_norm else 0
    own = norms + config.attention.parameters(config)
    return _projections(config) + config.n_layers * own


def _projections(config: ModelConfig) -> int:
    return 2 * config.n_layers * config.d_model * (config.n_heads + config.kv_heads) * config.head_size


def trained_parameters(config: TrainedConfig) -> int:
    """Those that an optimiser holds: all, attention's, or LoRA's deltas."""
    if config.trains_attention_alone:
        return attention_parameters(config.model)
    lora = config.adapter
    return parameter_counts(config.model).n_total if lora is None else lora_parameters(config.model, lora)


def shared_experts(config: TrainedConfig) -> tuple[int, int]:
    """Parameters of the experts that workers share (`moe.expert_parallel`), and of these the trained ones: a worker
    has its part of them, and ZeRO none.
    """
    moe = config.model.moe
    if moe is None or not moe.expert_parallel or config.resources.workers == 1:
        return 0, 0
    expert = 3 * config.model.d_model * config.model.expert_size
    n = mixture_layers(config.model) * moe.experts * expert
    return n, n if config.adapter is None else 0


def reference_parameters(config: TrainedConfig) -> int:
    """Of the frozen model that DPO and PPO keep beside the trained one; with LoRA that without its deltas serves."""
    separate = config.keeps_reference and config.adapter is None
    return parameter_counts(config.model).n_total if separate else 0


def training_flops_per_token(config: TrainedConfig) -> float:
    """What a training step spends on a token of its batch, without recomputation.

    LoRA leaves out the frozen weights' gradients: a third of their matrices' work, less than that of attention, which
    has none (Hu et al. 2022, section 4.2); its deltas cost 6 a parameter. So does a run that trains attention alone.
    """
    of_loss = step_flops_per_token(config, config.epochs)
    share = config.transfer_steps / config.total_steps
    return (1 - share) * of_loss + share * transfer_flops_per_token(config) if share else of_loss


def transfer_flops_per_token(config: TrainedConfig) -> float:
    """What a step that fits attention's outputs spends on a token: the start's forward pass up to its last layer, and
    attention alone, forward and backward.
    """
    start = flops_per_token(config.start_model, config.context_tokens)
    own = flops_per_token(config.model, config.context_tokens)
    passed = (start.total - start.logits) / TRAINING_PER_FORWARD
    return passed + TRAINING_PER_FORWARD * 2.0 * _projections(config.model) + own.attention


def step_flops_per_token(config: TrainedConfig, epochs: float, frozen_actor: bool = False) -> float:
    """What a step spends on a token: the forward passes beside training (DPO's reference; PPO's generation, old
    log-probabilities, reference and values), then `epochs` of training. Reward models are not counted.

    Args:
        frozen_actor: only the critic learns.
    """
    passes = config.forward_passes * _forward(config.start_model, config)
    learning = 0.0 if frozen_actor else _actor_flops(config)
    if config.critic_model is not None:
        critic = flops_per_token(config.critic_model, config.context_tokens)
        passes += (critic.total - critic.logits) / TRAINING_PER_FORWARD
        learning += critic.total - critic.logits
    return passes + epochs * learning


def _forward(model: ModelConfig, config: TrainedConfig) -> float:
    return flops_per_token(model, config.context_tokens).total / TRAINING_PER_FORWARD


def _actor_flops(config: TrainedConfig) -> float:
    full = flops_per_token(config.model, config.context_tokens)
    lora = config.adapter
    total = full.total
    if config.trains_attention_alone:
        projections = TRAINING_PER_FORWARD * 2.0 * _projections(config.model)
        total -= (full.matmul - projections + full.logits) / TRAINING_PER_FORWARD
    if lora is not None:
        total += (
            6.0 * lora_parameters(config.model, lora) - (full.matmul + full.logits) / TRAINING_PER_FORWARD
        )
    return total


def _computed_experts(config: ModelConfig) -> float | None:
    """Experts that compute a token in training, on average, where the load is even."""
    if config.moe is None:
        return None
    return config.moe.trained_experts * min(1.0, config.moe.capacity_factor or 1.0)


@dataclass(frozen=True)
class SavedElements:
    """Elements per token that a training step keeps for its backward pass."""

    blocks: float  # of all layers; with checkpointing each block's input
    working: float  # one block's: their gradients in the backward pass; recomputed, with checkpointing
    head: float  # logits, their log-probabilities and their gradient


def saved_elements_per_token(
    config: ModelConfig, checkpointing: bool, element_bytes: int = FP32_BYTES
) -> SavedElements:
    """What `workloads.model.transformer` saves, tensor by tensor (compare Korthikanti et al. 2022, section 4, for a
    GELU block with dropout): a block its two residual inputs and their norms, what its attention keeps, SwiGLU's gate
    and up, and their product; of a mixture of experts see below.
    """
    d = config.d_model
    block = 4 * d + config.attention.saved_elements(config, element_bytes) + 3 * config.ff_size
    mixtures, mixture = mixture_layers(config), block - 3 * config.ff_size + _saved_by_mixture(config)
    working = max([block] * (mixtures < config.n_layers) + [mixture] * (mixtures > 0))
    head = 3 * config.vocab_size
    if checkpointing:
        return SavedElements(config.n_layers * d, working, head)
    return SavedElements((config.n_layers - mixtures) * block + mixtures * mixture, working, head)


def _saved_by_mixture(config: ModelConfig) -> float:
    """What a mixture keeps in place of SwiGLU's three: gate and up of the experts that compute the token (their product
    is made again), three of the shared experts; the gate's logarithms, and a weight and three indices of 8 bytes a
    choice.
    """
    if config.moe is None:
        return 0.0
    moe, size = config.moe, config.expert_size
    computed = _computed_experts(config) or 0.0
    return 2 * computed * size + 3 * moe.shared_experts * size + moe.experts + 7 * moe.trained_experts


def exchanged_elements_per_token(config: ModelConfig) -> float:
    """What a mixture keeps besides for its backward pass where workers share its experts: the rows that come, and the
    answers that a token's choices get.
    """
    if config.moe is None:
        return 0.0
    return ((_computed_experts(config) or 0.0) + config.moe.trained_experts) * config.d_model


def moved_bytes_per_step(config: TrainedConfig) -> float:
    """An estimate of the bytes that all devices together move in memory in an optimiser step: activations are
    written, read and their gradients likewise (4 passes), weights are read three times a micro-batch, and AdamW
    moves 28 bytes a parameter.
    """
    width = 2 if config.training.precision == "bf16" else 4
    saved = saved_elements_per_token(config.model, False, width)
    n, ranks = parameter_counts(config.model).n_total, config.resources.workers
    micro_batches = config.training.batch_sequences // config.micro_batch_sequences
    activations = 4 * width * (saved.blocks + saved.head) * config.step_tokens
    experts, trained = shared_experts(config)
    updated = (trained_parameters(config) - trained) * (1 if config.training.zero_stage else ranks) + trained
    return activations + 3 * width * (n - experts + experts / ranks) * micro_batches + 28 * updated
