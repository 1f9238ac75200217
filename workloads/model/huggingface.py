"""Hugging Face's models in and out: the Llama family's weights fit ours unchanged, under other names.

No code of a model is ever run: weights come from safetensors alone, or from a .gguf file, which transformers
dequantises; what the model is comes from its config.json (config/pretrained.py).
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from escala.errors import CheckpointError
from workloads.config.pretrained import model_config_of, to_huggingface
from workloads.model.transformer import Transformer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
INNER = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
"""Our name inside a block -> theirs inside a layer."""


def their_name(name: str) -> str:
    """`blocks.3.attention.query.weight` as `model.layers.3.self_attn.q_proj.weight`."""
    if name in OUTER:
        return OUTER[name]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", name)
    if match is None or match[2] not in INNER:
        raise KeyError(name)
    return f"model.layers.{match[1]}.{INNER[match[2]]}.{match[3]}"


def load_pretrained(path: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model in a directory of safetensors, or in a .gguf file, on the CPU, in `dtype`.

    Raises CheckpointError, saying why, for what is no such model or one that we do not compute.
    """
    path = Path(path)
    try:
        config = model_config_of(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    weights = _gguf_weights(path) if path.is_file() else _safetensors(path)
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: their_name(name) for name, _ in model.named_parameters()}
    missing = sorted(theirs for theirs in wanted.values() if theirs not in weights)
    unused = sorted(weights.keys() - set(wanted.values()) - {OUTER["unembedding.weight"]})
    unused = [name for name in unused if not name.endswith("rotary_emb.inv_freq")]  # follows from the config
    if missing or unused:
        raise CheckpointError(
            f"{path} does not hold its own config's model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unused)} unknown {unused[:3]}"
        )
    state = {}
    for name, parameter in model.named_parameters():
        tensor = weights.pop(wanted[name])  # freed as soon as it is cast
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {wanted[name]} is {tuple(tensor.shape)}, its config says {tuple(parameter.shape)}"
            )
        state[name] = tensor.to(dtype)
    model.load_state_dict(state, assign=True)
    return model


def save_pretrained(model: Transformer, path: str | Path) -> None:
    """Write config.json and model.safetensors, which transformers and vLLM open."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = to_huggingface(model.config)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True))
    tensors = {their_name(n): p.detach().contiguous() for n, p in model.named_parameters()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def _safetensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files, memory-mapped."""
    if (directory / INDEX).is_file():
        files = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
    else:
        files = [WEIGHTS]
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        pickled = any(directory.glob("*.bin"))
        raise CheckpointError(
            f"{directory} lacks {missing[0]}"
            + ("; its .bin files are pickles, which could run code" if pickled else ""),
            "save the model as safetensors",
        )
    tensors = {}
    for name in files:
        with safe_open(directory / name, framework="pt") as reader:
            tensors |= {key: reader.get_tensor(key) for key in list(reader.keys())}
    return tensors


def _gguf_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .gguf file, dequantised by transformers."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"{path} needs the package {missing[0]}", "pip install 'escala[gguf]'")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a log is no terminal
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return dict(theirs.state_dict())
