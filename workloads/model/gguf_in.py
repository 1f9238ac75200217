"""GGUF files as they are: the codes of Q8_0, Q4_0 and Q4_1 without a detour over fp32.

All are blocks of 32 inputs of one output (ggml's `block_q8_0`, `block_q4_0`, `block_q4_1`): a scale d in fp16; of
Q4_1 an offset m in fp16; then 32 codes of 8 bits, or 16 bytes whose low halves are codes 0 to 15 and high halves 16 to
31. A weight is d q, d (q - 8), d q + m. Other quantised types (Q6_K, ...) are dequantised, which is printed.

Dimensions: O outputs, I inputs, G blocks of an output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from escala.contract.errors import CheckpointError, NotFoundError
from escala.schema import ModelConfig
from escala.schema.pretrained import model_config_of
from workloads.model.compression.layers import UNEMBEDDING, assembled
from workloads.model.compression.quantized import QuantizedWeight, pack_codes
from workloads.model.gguf_names import gguf_names, interleaved_rows, need_gguf
from workloads.model.transformer import Transformer

BLOCK = 32
HEADS = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2}  # fp16 numbers before a block's codes
PLAIN = ("F32", "F16", "BF16")


def load_gguf(path: Path) -> Transformer:
    """The model of a .gguf file: CompressedMatrix with the file's own codes where it has them, all else in fp32. Where
    a tied table is in codes, so is the output product; the table itself is made fp32 for look-up.

    Raises NotFoundError, or CheckpointError where it is no model that the transformer can represent, a tensor is
    missing or unknown, or gguf is not installed.
    """
    path = path.expanduser()
    if not path.exists():
        raise NotFoundError(f"there is no model at {path}", "give a .gguf file of this machine")
    need_gguf(path)
    try:
        config = model_config_of(path)
    except ValueError as error:
        raise CheckpointError(
            str(error), "give a Llama, Mistral or Qwen3 model without such parts"
        ) from error
    stored, plain, dequantized = _read(path, config)
    if dequantized:
        kinds = ", ".join(f"{kind} ({', '.join(names[:3])})" for kind, names in sorted(dequantized.items()))
        print(f"{path.name}: dequantised to fp32: {kinds}", flush=True)
    try:
        return assembled(config, stored, {f"{name}.weight": w for name, w in plain.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not of the model that its header describes: {error}") from error


def _read(
    path: Path, config: ModelConfig
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor], dict[str, list[str]]]:
    """By our names: matrices in codes, and tensors in fp32; and kind -> GGUF's names of what had to be dequantised."""
    import gguf

    ours = {theirs: name for name, theirs in gguf_names(config).items()}
    stored: dict[str, QuantizedWeight] = {}
    plain: dict[str, Tensor] = {}
    dequantized: dict[str, list[str]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        kind, name = tensor.tensor_type.name, ours.get(tensor.name)
        if name is None:
            raise CheckpointError(f"{path} has a tensor that is not known here: {tensor.name}")
        matrix = _codes(kind, tensor.data) if kind in HEADS and tensor.data.ndim == 2 else None
        if matrix is None or name == "embedding":
            whole = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            plain[name] = _with_our_rows(config, name, whole)
            if kind not in PLAIN and matrix is None:
                dequantized.setdefault(kind, []).append(tensor.name)
        if matrix is not None and name == "embedding" and config.tie_embeddings:
            stored[UNEMBEDDING] = matrix
        elif matrix is not None and name != "embedding":
            parts = {n: _with_our_rows(config, name, t) for n, t in matrix.tensors().items()}
            stored[name] = matrix.with_tensors(parts)
    return stored, plain, dequantized


def _with_our_rows(config: ModelConfig, name: str, rows: Tensor) -> Tensor:
    theirs = interleaved_rows(config, name)
    if theirs is None:
        return rows
    out = torch.empty_like(rows)
    out[theirs] = rows
    return out


def _codes(kind: str, data: npt.NDArray[Any]) -> QuantizedWeight | None:
    """The matrix of a tensor's bytes (outputs, bytes of a row). None where an offset of -8 d does not fit in fp16."""
    head = 2 * HEADS[kind]
    size = head + (BLOCK if kind == "Q8_0" else BLOCK // 2)
    blocks_OGb = torch.from_numpy(np.array(data)).view(len(data), -1, size)
    outputs, groups = blocks_OGb.shape[:2]
    numbers = blocks_OGb[..., :head].contiguous().view(torch.float16)
    scale_OG, bytes_OGb = numbers[..., 0].contiguous(), blocks_OGb[..., head:]
    shape = (outputs, groups * BLOCK)
    if kind == "Q8_0":
        return QuantizedWeight(8, shape, bytes_OGb.contiguous().view(torch.int8).view(shape), scale_OG)
    codes_OI = torch.cat((bytes_OGb & 15, bytes_OGb >> 4), -1).view(shape)
    offset_OG = numbers[..., 1].contiguous() if kind == "Q4_1" else -8 * scale_OG
    if not bool(offset_OG.isfinite().all()):
        return None
    return QuantizedWeight(4, shape, pack_codes(codes_OI, 4), scale_OG, offset_OG)
