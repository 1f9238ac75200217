"""A compressed model as a checkpoint: its manifest says of each matrix how it is stored, and nothing is quantised again
when it is loaded.

    compression.matrices.NAME        {"choice": a MatrixChoice, "shape": [O, I]}
    master/PARAMETER                 what is not compressed, in fp32
    stored/NAME.TENSOR               codes, scale, offset; left, right; bf16: as they are

`config.model` is the model that it is once it is dequantised: its output product stands apart from its table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from escala.contract.checkpoints import FORMAT_VERSION, checkpoint_name
from escala.contract.errors import CheckpointError
from escala.contract.sealed import seal
from escala.schema import ModelConfig
from escala.schema.compression import MatrixChoice
from escala.storage.base import CheckpointStore
from escala.storage.checkpoints import Checkpoint, read_checkpoint
from workloads.model.compression.layers import Compressed, assembled
from workloads.model.compression.low_rank import HalfWeight, LowRankWeight
from workloads.model.compression.quantized import QuantizedWeight
from workloads.model.transformer import Transformer
from workloads.model.weights import MASTER, load_weights, names, opened

COMPRESSION, STORED = "compression", "stored"
FILE = "compressed.safetensors"


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether its matrices are stored smaller."""
    return COMPRESSION in checkpoint.manifest


def save_compressed(
    store: CheckpointStore,
    step: int,
    plain: Mapping[str, Tensor],
    stored: Mapping[str, Compressed],
    choices: Mapping[str, MatrixChoice],
    manifest: Mapping[str, Any],
) -> Checkpoint:
    """Write a checkpoint of what stays as it is, by parameter, and of the stored matrices, by name. One of that step is
    replaced. Raises CheckpointError where it cannot be written.

    Args:
        manifest: the caller's part; `config.model` is of the untied model.
    """
    tensors = {f"{MASTER}/{name}": tensor.detach().float().contiguous() for name, tensor in plain.items()}
    for name, matrix in stored.items():
        tensors |= {f"{STORED}/{name}.{part}": t.contiguous() for part, t in matrix.tensors().items()}
    matrices = {
        name: {"choice": choices[name].model_dump(mode="json"), "shape": list(matrix.shape)}
        for name, matrix in stored.items()
    }
    name = checkpoint_name(step)
    try:
        store.begin(name)
        entry = store.put(name, FILE, lambda path: save_file(tensors, path))
        whole = {
            **manifest,
            "format_version": FORMAT_VERSION,
            "step": step,
            "files": {FILE: entry},
            "tokenizer": store.tokenizer_entries(),
            COMPRESSION: {"matrices": matrices},
        }
        store.publish(name, seal(whole), replace=True)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {name} cannot be written: {error}", "see that there is room for it"
        ) from error
    return read_checkpoint(store, name)


def load_stored(checkpoint: Checkpoint) -> Transformer:
    """The model of a compressed checkpoint, CompressedMatrix in the places of its matrices. Raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    for file in checkpoint.part("files", dict):
        with opened(checkpoint, file) as reader:
            tensors |= {
                name.removeprefix(f"{STORED}/"): reader.get_tensor(name)
                for name in names(reader)
                if name.startswith(f"{STORED}/")
            }
    try:
        config = ModelConfig(**checkpoint.part("config.model", dict))
        entries = checkpoint.part(f"{COMPRESSION}.matrices", dict)
        stored = {name: _matrix(name, entry, tensors) for name, entry in entries.items()}
        return assembled(config, stored, load_weights(checkpoint))
    except (ValidationError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.address} is not of its own model: {error}",
            "use the version of escala that wrote it",
        ) from error


def _matrix(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Compressed:
    """The matrix `name` from its tensors. Raises KeyError for one that is missing."""
    choice, (outputs, inputs) = MatrixChoice.model_validate(entry["choice"]), entry["shape"]
    if choice.rank is not None:
        return LowRankWeight(tensors[f"{name}.left"], tensors[f"{name}.right"])
    if choice.bits == 16:
        return HalfWeight(tensors[f"{name}.bf16"])
    codes, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
    return QuantizedWeight(choice.bits, (outputs, inputs), codes, scale, tensors.get(f"{name}.offset"))
