"""The matrices of a model's blocks by name, and what they take where they are stored smaller (docs/theory E.6)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from escala.schema.compression import MatrixChoice, is_kept
from escala.schema.model import ModelConfig
from escala.schema.training import TrainedConfig

STORED_BYTES = 2
"""Of a scale and of an offset."""


@dataclass(frozen=True)
class MatrixShape:
    """A block's matrix: its name in the model, as `quantization.keep` means it, its outputs and its inputs."""

    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True)
class StoredBase:
    """The frozen matrices of LoRA's base that are stored in codes.

    Attributes:
        parameters: how many weights these are.
        stored_bytes: codes, scales and offsets. Every worker has them all, at every ZeRO stage.
        largest: weights of the largest matrix, which is made whole for its product.
    """

    parameters: int = 0
    stored_bytes: int = 0
    largest: int = 0


def block_matrices(config: ModelConfig) -> Iterator[MatrixShape]:
    """Those that may be stored smaller, in the model's order: not norms, routers, or what an attention's kind adds."""
    d, heads, kv_heads = (
        config.d_model,
        config.n_heads * config.head_size,
        config.kv_heads * config.head_size,
    )
    attention = {"query": (heads, d), "key": (kv_heads, d), "value": (kv_heads, d), "output": (d, heads)}
    for layer in range(config.n_layers):
        for name, shape in attention.items():
            yield MatrixShape(f"blocks.{layer}.attention.{name}", *shape)
        prefix = f"blocks.{layer}.feed_forward"
        if config.moe is None or not config.has_experts(layer):
            yield from _swiglu(prefix, d, config.ff_size)
            continue
        for matrix in _swiglu(f"{prefix}.experts", d, config.expert_size):
            for expert in range(config.moe.experts):
                yield MatrixShape(f"{matrix.name}.{expert}", matrix.outputs, matrix.inputs)
        if config.moe.shared_experts:
            yield from _swiglu(f"{prefix}.shared", d, config.moe.shared_experts * config.expert_size)


def _swiglu(prefix: str, d: int, width: int) -> Iterator[MatrixShape]:
    for name, shape in {"gate": (width, d), "up": (width, d), "down": (d, width)}.items():
        yield MatrixShape(f"{prefix}.{name}", *shape)


def matrix_bytes(matrix: MatrixShape, choice: MatrixChoice) -> int:
    """Of a whole matrix in codes: a row's codes without holes, a scale for each group, an offset below 8 bits."""
    groups = 1 if choice.group is None else matrix.inputs // choice.group
    scales = groups * STORED_BYTES * (1 if choice.bits == 8 else 2)
    return matrix.outputs * (math.ceil(matrix.inputs * choice.bits / 8) + scales)


def stored_base(config: TrainedConfig) -> StoredBase:
    """Of the base of a run's LoRA; nothing where there is none, or it is in fp32."""
    lora = config.adapter
    if lora is None or lora.base == "fp32":
        return StoredBase()
    choice, keep = lora.quantization.choice(lora.base), lora.quantization.keep
    stored = [matrix for matrix in block_matrices(config.model) if not is_kept(matrix.name, keep)]
    sizes = [matrix.outputs * matrix.inputs for matrix in stored]
    return StoredBase(
        sum(sizes), sum(matrix_bytes(matrix, choice) for matrix in stored), max(sizes, default=0)
    )
