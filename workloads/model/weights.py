"""The weights in a checkpoint (escala.storage.checkpoints): safetensors files, of which nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from escala.contract.errors import CheckpointError
from escala.storage.checkpoints import Checkpoint

MASTER = "master"
"""Before the name of a parameter's fp32 weight. Engines beside the model's own have their name before it."""


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Parameter name -> fp32 master weight, on the CPU: a model's state for generation, export or fine-tuning.

    Raises CheckpointError where a file cannot be read.
    """
    prefix = f"{MASTER}/"
    weights: dict[str, Tensor] = {}
    for file in checkpoint.manifest["files"]:
        with opened(checkpoint, file) as reader:
            weights |= {
                n.removeprefix(prefix): reader.get_tensor(n) for n in names(reader) if n.startswith(prefix)
            }
    return weights


@contextmanager
def opened(checkpoint: Checkpoint, file: str) -> Iterator[Any]:
    """An open safetensors file of a checkpoint. Raises CheckpointError where it cannot be read (any more)."""
    try:
        with checkpoint.store.local(checkpoint.name, file) as path, safe_open(path, framework="pt") as reader:
            yield reader
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {checkpoint.address} is damaged: {file}: {error}") from error


def names(reader: Any) -> list[str]:
    """The tensors of an open safetensors file, which is no dict and cannot be iterated."""
    return list(reader.keys())
