"""The formats of models in Hugging Face's layout. One table, ARCHITECTURES: an entry says how a config.json reads and
is written, and what its weights are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from escala.schema.model import ModelConfig
from escala.schema.moe import MoEConfig

Json = Mapping[str, Any]

LLAMA_WEIGHTS = {  # ours -> theirs; a * is a number
    "embedding.weight": "model.embed_tokens.weight",
    "unembedding.weight": "lm_head.weight",
    "final_norm.weight": "model.norm.weight",
    "blocks.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "blocks.*.attention.query.weight": "model.layers.*.self_attn.q_proj.weight",
    "blocks.*.attention.key.weight": "model.layers.*.self_attn.k_proj.weight",
    "blocks.*.attention.value.weight": "model.layers.*.self_attn.v_proj.weight",
    "blocks.*.attention.output.weight": "model.layers.*.self_attn.o_proj.weight",
    "blocks.*.feed_forward_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "blocks.*.feed_forward.gate.weight": "model.layers.*.mlp.gate_proj.weight",
    "blocks.*.feed_forward.up.weight": "model.layers.*.mlp.up_proj.weight",
    "blocks.*.feed_forward.down.weight": "model.layers.*.mlp.down_proj.weight",
}
QK_NORM_WEIGHTS = {
    "blocks.*.attention.query_norm.weight": "model.layers.*.self_attn.q_norm.weight",
    "blocks.*.attention.key_norm.weight": "model.layers.*.self_attn.k_norm.weight",
}
EXPERT_WEIGHTS = {  # the second * of theirs is the expert's number: ours are stacked
    "blocks.*.feed_forward.router.weight": "model.layers.*.mlp.gate.weight",
    "blocks.*.feed_forward.experts.gate": "model.layers.*.mlp.experts.*.gate_proj.weight",
    "blocks.*.feed_forward.experts.up": "model.layers.*.mlp.experts.*.up_proj.weight",
    "blocks.*.feed_forward.experts.down": "model.layers.*.mlp.experts.*.down_proj.weight",
}
MIXTRAL_WEIGHTS = {
    "blocks.*.feed_forward.router.weight": "model.layers.*.block_sparse_moe.gate.weight",
    "blocks.*.feed_forward.experts.gate": "model.layers.*.block_sparse_moe.experts.*.w1.weight",
    "blocks.*.feed_forward.experts.up": "model.layers.*.block_sparse_moe.experts.*.w3.weight",
    "blocks.*.feed_forward.experts.down": "model.layers.*.block_sparse_moe.experts.*.w2.weight",
}
KEYS = {  # config.json -> ModelConfig
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_context_tokens",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
DEFAULTS = {  # of LlamaConfig, where config.json lacks a key; other classes' own differ from it
    "vocab_size": 32_000,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "intermediate_size": 11_008,
    "max_position_embeddings": 2048,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}


@dataclass(frozen=True)
class Architecture:
    """A family of models in Hugging Face's format.

    Attributes:
        model_type, class_name: config.json's `model_type` and its entry of `architectures`.
        fits: whether a ModelConfig is written in this format; the first fitting entry of the table is used.
        read: the part of a ModelConfig that is special to it, from config.json. Raises ValueError.
        write: the part of config.json that is special to it.
        covers: ModelConfig's fields that `read` and `write` carry, beyond those that all have.
        weights: our weights' names -> theirs.
        defaults: what their class takes where config.json lacks a key, as far as it is not DEFAULTS.
    """

    model_type: str
    class_name: str
    fits: Callable[[ModelConfig], bool]
    read: Callable[[Json], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    covers: frozenset[str] = frozenset()
    weights: Mapping[str, str] = field(default_factory=lambda: LLAMA_WEIGHTS)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _read_llama(config: Json) -> dict[str, Any]:
    return {}


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False}


def _read_mistral(config: Json) -> dict[str, Any]:
    return {"window_tokens": config.get("sliding_window", 4096)}


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.window_tokens}


def _read_qwen3(config: Json) -> dict[str, Any]:
    layers = int(config["num_hidden_layers"])
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    full = int(config.get("max_window_layers", 28))  # the first so many layers see everything
    kinds = config.get("layer_types") or [
        "sliding_attention" if window is not None and layer >= full else "full_attention"
        for layer in range(layers)
    ]
    if set(kinds) == {"full_attention"}:
        window = None
    elif set(kinds) != {"sliding_attention"}:
        raise ValueError(
            f"its layers differ in attention ({', '.join(sorted(set(kinds)))}); here all have one kind"
        )
    elif window is None:
        raise ValueError("its layers have sliding windows of no stated size")
    return {"qk_norm": True, "window_tokens": window}


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    kind = "full_attention" if config.window_tokens is None else "sliding_attention"
    return {
        "attention_bias": False,
        "use_sliding_window": config.window_tokens is not None,
        "sliding_window": config.window_tokens,
        "max_window_layers": config.n_layers if config.window_tokens is None else 0,
        "layer_types": [kind] * config.n_layers,
    }


def _experts_of(config: ModelConfig) -> MoEConfig:
    """The experts that a file can describe. Raises ValueError for those that compute otherwise."""
    moe = config.moe
    if moe is None:
        raise ValueError("it has no experts")
    if moe.shared_experts:
        raise ValueError(f"its class has no place for shared_experts: {moe.shared_experts}")
    if moe.estimator == "soft_to_hard":
        raise ValueError(
            "its experts' weights have a temperature (estimator: soft_to_hard), their class none"
        )
    if moe.evaluation_capacity_factor is not None:
        raise ValueError("it drops tokens in evaluation (evaluation_capacity_factor), their class never")
    return moe


def _read_mixtral(config: Json) -> dict[str, Any]:
    chosen = config.get("num_experts_per_tok", 2)
    if chosen == 1:
        raise ValueError("its one expert a token has the weight 1; here it has its probability")
    count = config.get("num_local_experts", config.get("num_experts", 8))  # transformers takes both names
    experts = {"experts": count, "chosen": chosen, "capacity_factor": None}
    return {"window_tokens": config.get("sliding_window"), "moe": experts}


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    moe = _experts_of(config)
    if moe.every != 1:
        raise ValueError(f"all layers of its class have experts; moe.every is {moe.every}")
    if moe.chosen == 1:
        raise ValueError(
            "its one expert a token has its probability as weight (moe.chosen: 1), their class 1"
        )
    return {
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.chosen,
        "intermediate_size": config.expert_size,
        "sliding_window": config.window_tokens,
    }


def _read_qwen3_moe(config: Json) -> dict[str, Any]:
    chosen = config.get("num_experts_per_tok", 8)
    if config.get("mlp_only_layers"):
        raise ValueError(f"its layers {config['mlp_only_layers']} are dense out of turn (mlp_only_layers)")
    if bool(config.get("norm_topk_prob", False)) != (chosen > 1):
        raise ValueError(
            "its experts' weights are renormalised over the chosen for one, or not for several (norm_topk_prob)"
        )
    experts = {
        "experts": config.get("num_experts", config.get("num_local_experts", 128)),  # transformers 4, and 5
        "chosen": chosen,
        "d_ff": config.get("moe_intermediate_size", 768),
        "every": config.get("decoder_sparse_step", 1),
        "capacity_factor": None,
    }
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None  # of all layers
    return {"qk_norm": True, "window_tokens": window, "moe": experts}


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    moe = _experts_of(config)
    return {
        "attention_bias": False,
        "use_sliding_window": config.window_tokens is not None,
        "sliding_window": config.window_tokens,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.chosen,
        "moe_intermediate_size": config.expert_size,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": [],
        "norm_topk_prob": moe.chosen > 1,
    }


ARCHITECTURES = (
    Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        lambda config: config.moe is not None and config.qk_norm,
        _read_qwen3_moe,
        _write_qwen3_moe,
        frozenset({"qk_norm", "window_tokens", "moe"}),
        LLAMA_WEIGHTS | QK_NORM_WEIGHTS | EXPERT_WEIGHTS,
        {
            "vocab_size": 151_936,
            "num_hidden_layers": 24,
            "hidden_size": 2048,
            "num_key_value_heads": 4,
            "intermediate_size": 6144,
            "max_position_embeddings": 32_768,
        },
    ),
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        lambda config: config.moe is not None,
        _read_mixtral,
        _write_mixtral,
        frozenset({"window_tokens", "moe"}),
        LLAMA_WEIGHTS | MIXTRAL_WEIGHTS,
        {
            "num_key_value_heads": 8,
            "intermediate_size": 14_336,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
        },
    ),
    Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        lambda config: config.qk_norm,
        _read_qwen3,
        _write_qwen3,
        frozenset({"qk_norm", "window_tokens"}),
        LLAMA_WEIGHTS | QK_NORM_WEIGHTS,
        {
            "vocab_size": 151_936,
            "num_key_value_heads": 32,
            "intermediate_size": 22_016,
            "max_position_embeddings": 32_768,
            "head_dim": 128,
        },
    ),
    Architecture(
        "mistral",
        "MistralForCausalLM",
        lambda config: config.window_tokens is not None,
        _read_mistral,
        _write_mistral,
        frozenset({"window_tokens"}),
        defaults={
            "num_key_value_heads": 8,
            "intermediate_size": 14_336,
            "max_position_embeddings": 131_072,
        },
    ),
    Architecture("llama", "LlamaForCausalLM", lambda config: True, _read_llama, _write_llama),
)


def architecture_of(model_type: object) -> Architecture:
    """The entry of the table with this `model_type`. Raises ValueError that lists the known ones."""
    for each in ARCHITECTURES:
        if each.model_type == model_type:
            return each
    known = ", ".join(sorted(each.model_type for each in ARCHITECTURES))
    raise ValueError(f"its architecture {model_type!r} is not known here ({known} are)")


def architecture_for(config: ModelConfig) -> Architecture:
    """The format that `config` is written in. Raises ValueError that names what it cannot carry."""
    architecture = next(each for each in ARCHITECTURES if each.fits(config))
    if reason := config.attention.unexportable(config):
        raise ValueError(f"Hugging Face's {architecture.class_name} cannot express the model: {reason}")
    carried = architecture.covers | set(KEYS.values()) | {"rope_base", "attention"}
    left = {
        name: getattr(config, name)
        for name, info in ModelConfig.model_fields.items()
        if name not in carried and getattr(config, name) != info.default
    }
    if left:
        told = ", ".join(f"{name}: {value}" for name, value in left.items())
        raise ValueError(f"Hugging Face's {architecture.class_name} has no place for {told}")
    return architecture


def their_names(ours: str, architecture: Architecture, config: ModelConfig) -> list[str]:
    """What `architecture` calls our weight: one name, or one for each expert, whose weights ours stacks.

    Raises ValueError for a weight that it does not have.
    """
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", ours)
    if pattern not in architecture.weights:
        raise ValueError(f"Hugging Face's {architecture.class_name} has no place for the weight {ours}")
    theirs = architecture.weights[pattern]
    for number in re.findall(r"(?<=\.)\d+(?=\.)", ours):
        theirs = theirs.replace("*", number, 1)
    if "*" not in theirs or config.moe is None:
        return [theirs]
    return [theirs.replace("*", str(expert)) for expert in range(config.moe.experts)]
