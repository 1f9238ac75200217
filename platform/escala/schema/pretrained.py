"""What a model on disk is: a Hugging Face directory's config.json, a GGUF file's header or a job's checkpoints, as a
ModelConfig, and back.

What our transformer cannot represent is refused with the reason; nothing is dropped silently, but for training's own
matters (dropout, initialisation, losses' coefficients, experts' capacity, precision of the file).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from escala.schema.architectures import DEFAULTS, KEYS, Json, architecture_for, architecture_of
from escala.schema.gguf_header import model_config_of_gguf
from escala.schema.model import ModelConfig


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


def with_model_of_start(data: Any) -> Any:
    """What is written of a configuration, with the `model` that stands at its start; as it is where it says neither.
    Raises ValueError as `model_config_of`.
    """
    if not isinstance(data, dict) or not isinstance(data.get("start"), dict):
        return data
    path = data["start"].get("path")
    if path is None or data.get("model"):  # an attempt's spec has both: the path may be gone by then
        return data
    return {**data, "model": model_config_of(Path(path).expanduser())}


def _step(manifest: Path) -> tuple[int, str]:
    """Sorts the directories of checkpoints as their steps, not as their letters."""
    return len(manifest.parent.name), manifest.parent.name


def _model_of_newest(manifests: list[Path]) -> ModelConfig:
    """The model in the first of these manifests of one job that can be read. Raises ValueError with the first reason.

    The loader of its weights checks whether a manifest is what was written (escala.contract.checkpoints).
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
