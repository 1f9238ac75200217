"""What a model on disk is: a Hugging Face directory's config.json, or a GGUF file's header, as a ModelConfig, and back.

One table, ARCHITECTURES: an entry says how a config.json reads and what its weights are called. What our transformer
cannot represent is refused with the reason; nothing is dropped silently, but for training's own matters (dropout,
initialisation, losses' coefficients, experts' capacity, precision of the file).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from escala.schema.gguf_header import model_config_of_gguf
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


def model_config_of(path: str | Path) -> ModelConfig:
    """The model in a Hugging Face directory (its config.json), a .gguf file (its header) or a job's checkpoints.

    Raises ValueError that names the path and the reason: unreadable, an unknown architecture, or a part that the
    transformer cannot represent.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _explain(path, lambda: model_config_of_gguf(path))
    manifests = [
        path / "manifest.json",
        *sorted(path.glob("step-*[0-9]/manifest.json"), key=_step, reverse=True),
    ]
    if found := [manifest for manifest in manifests if manifest.is_file()]:
        return _explain(path, lambda: _model_of_newest(found))
    return _explain(path, lambda: from_hugging_face(read_config_json(path)))


def _step(manifest: Path) -> tuple[int, str]:
    """Sorts the directories of checkpoints as their steps, not as their letters."""
    return len(manifest.parent.name), manifest.parent.name


def _model_of_newest(manifests: list[Path]) -> ModelConfig:
    """The model in the first of these manifests of one job that can be read. Raises ValueError with the first reason.

    Whether a manifest is what was written, whoever loads its weights checks (escala.contract.checkpoints).
    """
    reasons = []
    for manifest in manifests:
        try:
            return ModelConfig(**json.loads(manifest.read_text(encoding="utf-8"))["config"]["model"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reasons.append(f"{manifest.parent.name} has no usable manifest: {type(error).__name__}: {error}")
    raise ValueError(reasons[0])


def read_config_json(directory: Path) -> dict[str, Any]:
    """config.json of a directory. Raises ValueError."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            "there is no config.json; give a Hugging Face directory (config.json and *.safetensors) or a .gguf file"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"its config.json can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("its config.json is not an object")
    return config


def architecture_of(model_type: object) -> Architecture:
    """The entry of the table with this `model_type`. Raises ValueError that lists the known ones."""
    for each in ARCHITECTURES:
        if each.model_type == model_type:
            return each
    known = ", ".join(sorted(each.model_type for each in ARCHITECTURES))
    raise ValueError(f"its architecture {model_type!r} is not known here ({known} are)")


def from_hugging_face(config: Json) -> ModelConfig:
    """The ModelConfig that a config.json describes. Raises ValueError."""
    architecture = architecture_of(config.get("model_type"))
    _refuse_unrepresentable(config)
    defaults: dict[str, Any] = {**DEFAULTS, **architecture.defaults}
    settings = defaults | {key: config[key] for key in KEYS if key in config}
    ours = {ours: settings[theirs] for theirs, ours in KEYS.items()}
    base = _rope_base(config, defaults["rope_theta"])
    return ModelConfig(**ours, rope_base=base, **architecture.read({**defaults, **config}))


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """config.json's content for `config`: transformers 4 and 5, and vLLM, read it.

    Raises ValueError where Hugging Face's formats cannot express the model.
    """
    architecture = architecture_for(config)
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **{theirs: getattr(config, ours) for theirs, ours in KEYS.items()},
        "hidden_act": "silu",
        "rope_theta": config.rope_base,  # transformers 4; the next line is 5's
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        **architecture.write(config),
    }


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


def _explain(path: Path, read: Callable[[], ModelConfig]) -> ModelConfig:
    try:
        return read()
    except ValidationError as error:
        reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error)
    raise ValueError(f"{path} is not a model that can be loaded: {reason}")


def _refuse_unrepresentable(config: Json) -> None:
    """Raise ValueError for the first part of a config.json that the transformer does not have."""
    if config.get("auto_map"):
        raise ValueError("it comes with code of its own (auto_map), and no remote code is ever run here")
    if config.get("quantization_config"):
        raise ValueError(
            "its weights are quantised (quantization_config); give the unquantised ones, or a .gguf file"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"its activation is {config['hidden_act']}; only silu (SwiGLU) is known here")
    for bias in ("attention_bias", "mlp_bias"):
        if config.get(bias):
            raise ValueError(f"it has biases ({bias}: true); projections here have none")


def _rope_base(config: Json, default: float) -> float:
    """rope_theta, by the keys of transformers 4 or 5, or the `default` of their class. Raises ValueError where RoPE is
    scaled or partial.
    """
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError("its RoPE differs between kinds of layers; here all layers have one")
    if kind != "default":
        raise ValueError(f"its RoPE is scaled ({kind}); only plain RoPE is known here")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(
            f"its RoPE turns a part of each head (partial_rotary_factor: {partial}); here it turns all"
        )
    base = rope.get("rope_theta", config.get("rope_theta"))
    return default if base is None else base
