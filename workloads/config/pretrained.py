"""What a pretrained model is, read from its files without loading it: pydantic and the standard library only.

Layouts: a directory with Hugging Face's config.json, a .gguf file, a checkpoint of ours or a directory of them. What we
cannot compute exactly as the model's makers do is refused here by name, never left out.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workloads.config.model import ModelConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_context_tokens",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
"""Hugging Face's name -> ModelConfig's."""


@dataclass(frozen=True)
class Architecture:
    """One of Hugging Face's, and what of a ModelConfig it stands for."""

    model_type: str
    name: str  # its class
    qk_norm: bool = False
    windowed: bool = False
    max_context_tokens: int = 2048  # of a config.json that states none: the class's defaults
    extra: Mapping[str, Any] = field(default_factory=dict)  # written into config.json


ARCHITECTURES = {
    a.model_type: a
    for a in (
        Architecture("llama", "LlamaForCausalLM", extra={"attention_bias": False, "mlp_bias": False}),
        Architecture("mistral", "MistralForCausalLM", windowed=True, max_context_tokens=131_072),
        Architecture(
            "qwen3",
            "Qwen3ForCausalLM",
            qk_norm=True,
            max_context_tokens=32_768,
            extra={"attention_bias": False},
        ),
    )
}


def model_config_of(path: Path) -> ModelConfig:
    """The model at `path`. Raises ValueError, saying why, where there is none or it is one that we do not compute."""
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path)
    if (path / "config.json").is_file():
        return from_huggingface(_read(path / "config.json"))
    manifests = [path / "manifest.json", *sorted(path.glob("step-*[0-9]/manifest.json"), reverse=True)]
    found = next((m for m in manifests if m.is_file()), None)
    if found is None:
        raise ValueError(
            f"{path} holds no model: give a directory with config.json and .safetensors files, a .gguf file, or the "
            "checkpoints of a job"
        )
    return ModelConfig(**_read(found)["config"]["model"])


def from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json (of transformers 4 or 5). Raises ValueError."""
    kind = config.get("model_type")
    architecture = ARCHITECTURES.get(str(kind))
    if architecture is None:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    refused = _refused(config)
    if refused:
        raise ValueError(f"this {kind} cannot be loaded: {'; '.join(refused)}")
    rope = config.get("rope_parameters") or {}
    values = {ours: config[theirs] for theirs, ours in FIELDS.items() if config.get(theirs) is not None}
    window = (
        config.get("sliding_window") if architecture.windowed or config.get("use_sliding_window") else None
    )
    return ModelConfig(
        **{
            "tie_embeddings": False,  # transformers' default, which config.json then leaves out
            "max_context_tokens": architecture.max_context_tokens,
            **values,
            "rope_base": rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
            "qk_norm": architecture.qk_norm,
            "window_tokens": window,
        }
    )


def to_huggingface(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model: Qwen3 with norms of queries and keys, Mistral with a window, else Llama.

    Raises ValueError for a model that none of the architectures stands for.
    """
    windowed = model.window_tokens is not None
    kind = "qwen3" if model.qk_norm else "mistral" if windowed else "llama"
    architecture = ARCHITECTURES[kind]
    plain = model.model_dump()
    config: dict[str, Any] = {theirs: plain[ours] for theirs, ours in FIELDS.items()}
    if windowed and model.qk_norm:
        config |= {"use_sliding_window": True, "max_window_layers": 0}
        config["layer_types"] = ["sliding_attention"] * model.n_layers
    return {
        **config,
        **architecture.extra,
        "model_type": kind,
        "architectures": [architecture.name],
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "rope_theta": model.rope_base,  # for readers of transformers 4's files
        "sliding_window": model.window_tokens,
        "dtype": "float32",
    }


def _refused(config: Mapping[str, Any]) -> list[str]:
    """What of a config.json we do not compute."""
    found = []
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        found.append(f"its RoPE is scaled ({kind})")
    share = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        found.append(f"RoPE turns only {share:g} of each head")
    found += [f"it has {name}" for name in ("attention_bias", "mlp_bias") if config.get(name)]
    if config.get("hidden_act", "silu") != "silu":
        found.append(f"its activation is {config['hidden_act']}, not silu")
    layers = set(config.get("layer_types") or [])
    if config.get("use_sliding_window") and not layers:
        first = config.get("max_window_layers", 0)  # layers below it see everything
        layers = {"sliding_attention"} if first == 0 else {"full_attention", "sliding_attention"}
    if len(layers) > 1 or not layers <= {"full_attention", "sliding_attention"}:
        found.append(f"its layers differ: {', '.join(sorted(layers))}")
    if config.get("quantization_config"):
        found.append("its weights are quantised (a .gguf file is dequantised)")
    return found


GGUF_FIELDS = {
    "block_count": "n_layers",
    "embedding_length": "d_model",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "d_ff",
    "context_length": "max_context_tokens",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_base",
    "attention.sliding_window": "window_tokens",
}
"""GGUF's key below the architecture's name -> ModelConfig's."""


def _from_gguf(path: Path) -> ModelConfig:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{path} is read by the package gguf, which is missing: pip install 'escala[gguf]'")
    import gguf

    reader = gguf.GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()
    if kind not in ("llama", "qwen3"):
        raise ValueError(f"{path} is a {kind}, not one of llama, qwen3")
    scaling = reader.fields.get(f"{kind}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise ValueError(f"{path} cannot be loaded: its RoPE is scaled ({scaling.contents()})")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values = {
        ours: reader.fields[f"{kind}.{theirs}"].contents()
        for theirs, ours in GGUF_FIELDS.items()
        if f"{kind}.{theirs}" in reader.fields
    }
    return ModelConfig(
        **values,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        tie_embeddings="output.weight" not in tensors,
        qk_norm=kind == "qwen3",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    return data
