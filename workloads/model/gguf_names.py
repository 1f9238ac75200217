"""What GGUF calls the weights of a Llama or a Qwen3, and how it orders the rows of a Llama's queries and keys."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from escala.contract.errors import CheckpointError
from escala.schema import ModelConfig

LLAMA, QWEN3 = "llama", "qwen3"
_WHOLE = {"embedding": "token_embd", "final_norm": "output_norm", "unembedding": "output"}
_OF_BLOCK = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}


def gguf_architecture(config: ModelConfig) -> str:
    """Qwen3 has norms of heads; Mistral is a llama in GGUF, too."""
    return QWEN3 if config.qk_norm else LLAMA


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Our matrix or norm (without `.weight`) -> GGUF's tensor, of a dense model; the output product among them, whether
    or not the model has one of its own.
    """
    per_block = {
        f"blocks.{layer}.{ours}": f"blk.{layer}.{theirs}.weight"
        for layer in range(config.n_layers)
        for ours, theirs in _OF_BLOCK.items()
        if config.qk_norm or not ours.endswith(("query_norm", "key_norm"))
    }
    return {ours: f"{theirs}.weight" for ours, theirs in _WHOLE.items()} | per_block


def interleaved_rows(config: ModelConfig, name: str) -> Tensor | None:
    """Of a Llama's queries and keys: at each of GGUF's rows, which of ours it is. There the two channels that RoPE
    turns together are neighbours, here they are half a head apart. None: the rows are the same.
    """
    heads = {"query": config.n_heads, "key": config.kv_heads}.get(name.rpartition("attention.")[2])
    if heads is None or gguf_architecture(config) != LLAMA:
        return None
    return torch.arange(heads * config.head_size).view(heads, 2, -1).transpose(1, 2).flatten()


def need_gguf(path: Path) -> None:
    """Raises CheckpointError where the package gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{path} can't be read or written: gguf is not installed", "pip install gguf")
