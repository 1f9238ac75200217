"""The model that fine-tuning, generation and export start from: pretrained weights, or a job's checkpoint.

A checkpoint of a LoRA run holds its deltas alone: the model is that run's own start, with them merged. One of a
conversion holds attention's weights: all others are its start's. One of `escala compress` holds its matrices in codes:
`load_compressed` gives them as they are stored, everything else a plain model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from escala.contract.checkpoints import MANIFEST, TOKENIZER, step_of
from escala.contract.errors import CheckpointError
from escala.schema import WORKLOADS, ModelConfig, StartConfig, TrainedConfig
from escala.storage.checkpoints import (
    Checkpoint,
    checkpoint_at,
    latest,
    open_checkpoints,
    verify,
    verify_tokenizer,
)
from workloads.data.chat import ChatTokenizer
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.model.compression.layers import decompress_model
from workloads.model.compression.saved import is_compressed, load_stored
from workloads.model.conversion import converted
from workloads.model.gguf_in import load_gguf
from workloads.model.huggingface import load_pretrained
from workloads.model.lora import add_lora, merge_lora
from workloads.model.transformer import Transformer
from workloads.model.weights import load_weights

USABLE = {
    "workload": str,
    "config": dict,
}  # what the manifest of a checkpoint must say for a model to be made of it
TRUNK = "trunk."  # of a reward model (rewards/reward_model.py)


def load_model(path: Path) -> Transformer:
    """The fp32 model at `path`: Hugging Face's safetensors, a .gguf file, a checkpoint, or a job's checkpoints (the
    newest good one). Of a reward model, its trunk. Raises CheckpointError, NotFoundError.
    """
    found = find_checkpoint(path)
    return load_pretrained(path) if found is None else checkpoint_model(found)


def load_compressed(path: Path) -> Transformer:
    """The model at `path` with CompressedMatrix where its matrices are stored smaller (a checkpoint of `compress`, a
    .gguf file's own codes); a plain one as `load_model` has it. Raises CheckpointError, NotFoundError.
    """
    if path.suffix == ".gguf":
        return load_gguf(path)
    found = find_checkpoint(path)
    return load_stored(found) if found is not None and is_compressed(found) else load_model(path)


def load_tokenizer(path: Path) -> ChatTokenizer:
    """The tokenizer that stands with the model at `path`. Raises DataError; CheckpointError where it is not the one
    that the checkpoint was written with.
    """
    found = find_checkpoint(path)
    if found is not None:
        verify_tokenizer(found)
    return load_chat_tokenizer(tokenizer_path(path))


def tokenizer_path(path: Path) -> Path:
    """Where the tokenizer of the model at `path` stands, and what its generation ends at. Raises CheckpointError."""
    found = find_checkpoint(path)
    return path if found is None else Path(found.store.address) / TOKENIZER


def find_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or the newest good one in it; None where it holds none. Raises CheckpointError."""
    try:
        inside = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}", "check who may read it") from error
    if MANIFEST in inside or (step_of(path.name) is not None and "config.json" not in inside and inside):
        checkpoint = checkpoint_at(path)
        verify(checkpoint)
        return checkpoint
    if not any(step_of(name) is not None for name in inside):
        return None
    found, refused = latest(open_checkpoints(path), USABLE)
    if found is None:
        why, hint = (refused[0].message, refused[0].hint) if refused else ("", "")
        raise CheckpointError(
            f"there is no good checkpoint in {path}{f': {why}' if why else ''}",
            hint or "wait for the job's first one",
        )
    return found


def checkpoint_config(checkpoint: Checkpoint) -> TrainedConfig:
    """The configuration of the run that wrote it. Raises CheckpointError where this version does not know it."""
    workload, config = checkpoint.part("workload", str), checkpoint.part("config", dict)
    try:
        parsed: TrainedConfig = WORKLOADS[workload].parse(config)
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.address} is of a {workload} run whose configuration does not validate here: "
            f"{error}",
            "use the version of escala that wrote it",
        ) from error
    return parsed


def checkpoint_model(checkpoint: Checkpoint) -> Transformer:
    """The transformer of a checkpoint, its deltas merged; of a conversion, with its start's other weights; of a reward
    model, its trunk; of a compressed one, dequantised.
    """
    if is_compressed(checkpoint):
        return decompress_model(load_stored(checkpoint))
    config, weights = checkpoint_config(checkpoint), load_weights(checkpoint)
    is_reward = has_scalar_head(checkpoint)
    if is_reward:
        weights = {n.removeprefix(TRUNK): w for n, w in weights.items() if n.startswith(TRUNK)}
    if config.trains_attention_alone:
        model = new_model(config)
        _assign(model, {**dict(model.state_dict()), **weights}, checkpoint)
        return model
    if config.adapter is None:
        with torch.device("meta"):
            model = Transformer(headless(config.model) if is_reward else config.model)
        _assign(model, weights, checkpoint)
        return model
    model = new_model(config)
    add_lora(model, config.adapter)
    _assign(model, {**dict(model.state_dict()), **weights}, checkpoint)
    merge_lora(model)
    return model


def has_scalar_head(checkpoint: Checkpoint) -> bool:
    """Whether its model is a trunk with a scalar head (a reward model)."""
    workload = WORKLOADS.get(checkpoint.part("workload", str))
    return workload is not None and workload.scalar_head


def headless(model: ModelConfig) -> ModelConfig:
    """The configuration of a reward model's trunk, which has no unembedding of its own."""
    return model.model_copy(update={"tie_embeddings": True})


def new_model(config: TrainedConfig) -> Transformer:
    """What a run with this configuration starts from, in fp32: its start, converted where the run does so, or weights
    drawn from torch's generator.
    """
    start = config.starts_from
    if start is None:
        return Transformer(config.model)
    model = start_of(config, start)
    return model if config.start_model == config.model else converted(model, config.model)


def start_of(config: TrainedConfig, start: StartConfig) -> Transformer:
    """The model that stands at the run's start, in fp32. Raises CheckpointError where it is another one than when the
    run was queued.
    """
    if start.path is None:
        raise CheckpointError(
            f"the job {start.job} to start from was not looked up", "submit it by `escala submit`"
        )
    model = load_model(Path(start.path))
    if model.config != config.start_model:
        raise CheckpointError(
            f"{start.path} holds another model (attention {model.config.attention.kind}) than the one that this run "
            "was queued with",
            "submit the job again: what stood there has been replaced",
        )
    return model


def _assign(model: Transformer, weights: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {checkpoint.address} is not of its own model: {error}") from error
