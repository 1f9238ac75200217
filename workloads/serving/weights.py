"""State dicts as bytes and back: what `escala.rollouts.weights` publishes, without a copy on either side."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from escala.contract.errors import CheckpointError
from escala.rollouts.weights import TensorEntry, Weights
from escala.schema.compression import Precision

PRECISIONS: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
    "int4": torch.float32,
}
"""What a deployment computes in, by the name that a weight version carries: of int8 and int4, all but the matrices."""


def pack(state: Mapping[str, Tensor]) -> Weights:
    """A state dict's bytes, in the order of names. Tensors on the CPU and contiguous are not copied."""
    entries, buffers = [], []
    for name in sorted(state):
        tensor = state[name].detach().to("cpu").contiguous()
        entries.append(TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        buffers.append(tensor.flatten().view(torch.uint8).numpy())
    return Weights(tuple(entries), tuple(buffers))


def unpack(weights: Weights) -> dict[str, Tensor]:
    """The state dict of `weights`, on the CPU. The tensors share the bytes, which may not be written to.

    Raises CheckpointError where an entry's dtype is unknown, or its bytes are not its shape's.
    """
    return {
        entry.name: _tensor(entry, buffer)
        for entry, buffer in zip(weights.entries, weights.buffers, strict=True)
    }


def _tensor(entry: TensorEntry, buffer: Any) -> Tensor:
    dtype = getattr(torch, entry.dtype, None)
    wanted = math.prod(entry.shape) * (dtype.itemsize if isinstance(dtype, torch.dtype) else 0)
    if not isinstance(dtype, torch.dtype) or memoryview(buffer).nbytes != wanted:
        raise CheckpointError(f"Published tensor {entry.name} is not {entry.shape} of {entry.dtype}.")
    if not wanted:
        return torch.empty(entry.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given (buffer|NumPy array) is not writable")
        return torch.frombuffer(buffer, dtype=dtype).view(entry.shape)
