"""A model as a GGUF file that transformers and llama.cpp open, its matrices as they are stored.

8-bit codes are written as Q8_0 and 4-bit ones as Q4_1; a scale of a longer group, or of a whole output, is repeated for
each of its blocks of 32. Whatever else a matrix is (plain, bf16, other widths, low rank) is written in fp32. Nothing is
rounded: a scale that fp16 does not hold is refused.

Dimensions: O outputs, G groups of inputs, b bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from escala.contract.errors import CheckpointError
from escala.schema.pretrained import to_hugging_face
from workloads.data.chat import ChatTokenizer
from workloads.model.compression.layers import CompressedMatrix
from workloads.model.compression.quantized import QuantizedWeight
from workloads.model.gguf_in import BLOCK
from workloads.model.gguf_names import gguf_architecture, gguf_names, interleaved_rows, need_gguf
from workloads.model.transformer import Transformer

NORMAL, CONTROL, UNUSED = 1, 3, 5
"""Kinds of tokens (llama.cpp's llama_token_type)."""
GPT2 = "gpt-2"
"""llama.cpp's name of the pre-tokenizer that is ByteLevel's own expression."""


def save_gguf(model: Transformer, path: Path, tokenizer: ChatTokenizer) -> None:
    """Write `model` with its tokenizer. Where the output product of a tied model is in codes, it is written as
    `output.weight`, and the table in fp32: who reads the file finds an untied model.

    Raises CheckpointError where GGUF cannot express the model, its tokenizer or a scale, or gguf is not installed.
    """
    need_gguf(path)
    import gguf

    config, names = model.config, gguf_names(model.config)
    try:
        to_hugging_face(config)
    except ValueError as error:
        raise CheckpointError(str(error), "such a model can be used within escala only") from error
    if config.moe is not None:
        raise CheckpointError("a mixture of experts is not written as GGUF here", "export it without --gguf")
    file = gguf.GGUFWriter(path, gguf_architecture(config))
    _write_settings(file, model)
    _write_tokenizer(file, tokenizer, config.vocab_size)
    kinds = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_1}
    for name, module in model.named_modules():
        if name not in names:
            continue
        if isinstance(module, CompressedMatrix):
            matrix, rows = module.compressed, interleaved_rows(config, name)
            if isinstance(matrix, QuantizedWeight) and matrix.bits in kinds and matrix.group % BLOCK == 0:
                blocks_Ob = gguf_blocks(name, matrix)
                blocks_Ob = blocks_Ob if rows is None else blocks_Ob[rows]
                file.add_tensor(names[name], blocks_Ob.numpy(), raw_dtype=kinds[matrix.bits])
                continue
            weight = matrix.dequantize()
        else:
            weight, rows = module.weight.detach().float().cpu(), interleaved_rows(config, name)
        file.add_tensor(names[name], (weight if rows is None else weight[rows]).contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def gguf_blocks(name: str, matrix: QuantizedWeight) -> Tensor:
    """The bytes (outputs, bytes of a row) of a matrix in 8- or 4-bit codes, in groups of whole blocks. Raises
    CheckpointError where a scale or an offset is no fp16 number; `name` is for its message.
    """
    outputs = matrix.shape[0]
    codes_OGb = matrix.unpacked_OI().view(outputs, -1, BLOCK)
    low, high = codes_OGb.chunk(2, -1)
    bytes_OGb = codes_OGb.view(torch.uint8) if matrix.bits == 8 else low | (high << 4)
    numbers = [matrix.scale_OG] if matrix.offset_OG is None else [matrix.scale_OG, matrix.offset_OG]
    heads = [_half(name, one).repeat_interleave(matrix.group // BLOCK, 1).unsqueeze(-1) for one in numbers]
    head_OGb = torch.cat(heads, -1).view(torch.uint8)
    return torch.cat((head_OGb, bytes_OGb), -1).view(outputs, -1)


def _half(name: str, numbers_OG: Tensor) -> Tensor:
    half_OG = numbers_OG.half()
    if not torch.equal(half_OG.float(), numbers_OG.float()):
        raise CheckpointError(
            f"GGUF stores scales in fp16, which does not hold all of {name}'s", f"keep {name} as it is (keep)"
        )
    return half_OG


def _write_settings(file: Any, model: Transformer) -> None:
    config = model.config
    file.add_name("escala")
    file.add_block_count(config.n_layers)
    file.add_context_length(config.max_context_tokens)
    file.add_embedding_length(config.d_model)
    file.add_feed_forward_length(config.ff_size)
    file.add_head_count(config.n_heads)
    file.add_head_count_kv(config.kv_heads)
    file.add_key_length(config.head_size)
    file.add_value_length(config.head_size)
    file.add_rope_dimension_count(config.head_size)
    file.add_rope_freq_base(config.rope_base)
    file.add_layer_norm_rms_eps(config.norm_eps)
    file.add_vocab_size(config.vocab_size)
    if config.window_tokens is not None:
        file.add_sliding_window(config.window_tokens)


def _write_tokenizer(file: Any, tokenizer: ChatTokenizer, vocab_size: int) -> None:
    """As llama.cpp has byte-level BPE. Raises CheckpointError for another kind of tokenizer."""
    parts = json.loads(tokenizer.tokenizer.to_str())
    words = parts["pre_tokenizer"] or {}
    if parts["model"]["type"] != "BPE" or words.get("type") != "ByteLevel" or parts["normalizer"] is not None:
        raise CheckpointError(
            "only a byte-level BPE with ByteLevel's own expression is written as GGUF; this tokenizer is another",
            "export without --gguf, and convert with llama.cpp's own script",
        )
    special = {token["content"] for token in parts["added_tokens"] if token["special"]}
    by_id = {number: token for token, number in tokenizer.tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id.get(number, f"[unused{number}]") for number in range(vocab_size)]
    kinds = [
        CONTROL if by_id.get(number) in special else NORMAL if number in by_id else UNUSED
        for number in range(vocab_size)
    ]
    merges = parts["model"]["merges"]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(GPT2)
    file.add_token_list(tokens)
    file.add_token_types(kinds)
    file.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    file.add_eos_token_id(tokenizer.end_of_text)
    file.add_bos_token_id(tokenizer.end_of_text)
    file.add_add_bos_token(False)
    file.add_chat_template(tokenizer.template)
