"""The model that fine-tuning, generation and export start from: pretrained weights, or a job's checkpoint.

A checkpoint of a LoRA run holds its deltas alone: the model is that run's own start, with them merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from escala.errors import CheckpointError
from escala.manifests import MANIFEST, TOKENIZER, Checkpoint, latest, read_checkpoint, verify
from workloads.config import WORKLOADS, FineTuneConfig, TrainedConfig
from workloads.data.chat import ChatTokenizer, load_chat_tokenizer
from workloads.model.huggingface import load_pretrained
from workloads.model.lora import add_lora, merge_lora
from workloads.model.transformer import Transformer
from workloads.training.checkpoint import load_weights

REWARD_HEAD = "head."
TRUNK = "trunk."


def load_model(path: Path) -> Transformer:
    """The fp32 model at `path`: Hugging Face's safetensors, a .gguf file, a checkpoint, or a job's checkpoints (the
    newest good one). Of a reward model, its trunk. Raises CheckpointError, NotFoundError.
    """
    found = find_checkpoint(path)
    return load_pretrained(path) if found is None else checkpoint_model(found)


def load_tokenizer(path: Path) -> ChatTokenizer:
    """The tokenizer that stands with the model at `path`. Raises DataError."""
    found = find_checkpoint(path)
    return load_chat_tokenizer(path if found is None else found.path.parent / TOKENIZER)


def find_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or the newest good one in it; None where it holds none. Raises CheckpointError."""
    if (path / MANIFEST).is_file():
        checkpoint = read_checkpoint(path)
        verify(checkpoint)
        return checkpoint
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found, refused = latest(path)
    if found is None:
        why = f": {refused[0]}" if refused else ""
        raise CheckpointError(f"there is no good checkpoint in {path}{why}", "wait for the job's first one")
    return found


def checkpoint_config(checkpoint: Checkpoint) -> TrainedConfig:
    """The configuration of the run that wrote it."""
    return WORKLOADS[checkpoint.manifest["workload"]][1](**checkpoint.manifest["config"])


def checkpoint_model(checkpoint: Checkpoint) -> Transformer:
    """The transformer of a checkpoint, its deltas merged."""
    config = checkpoint_config(checkpoint)
    weights = load_weights(checkpoint)
    weights = {n.removeprefix(TRUNK): w for n, w in weights.items() if not n.startswith(REWARD_HEAD)}
    model = new_model(config)
    if isinstance(config, FineTuneConfig) and config.lora is not None:
        add_lora(model, config.lora)
        _assign(model, weights, checkpoint, strict=False)
        merge_lora(model)
    else:
        _assign(model, weights, checkpoint, strict=True)
    return model


def new_model(config: TrainedConfig) -> Transformer:
    """What a run with this configuration starts from, in fp32: its start, or weights drawn from torch's generator."""
    start: Any = config.start if isinstance(config, FineTuneConfig) else None
    model = Transformer(config.model) if start is None else load_model(Path(start.path))
    if model.config != config.model:
        raise CheckpointError(
            f"{start.path} holds another model than the one that this run was queued with",
            "submit the job again: what stood there has been replaced",
        )
    return model


def _assign(model: Transformer, weights: dict[str, Tensor], checkpoint: Checkpoint, strict: bool) -> None:
    found = model.load_state_dict(weights, strict=False, assign=True)
    tied = {"unembedding.weight"} if model.config.tie_embeddings else set()
    missing = [n for n in found.missing_keys if strict and n not in tied]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is not of its own model: {[*missing, *found.unexpected_keys][:4]}"
        )
