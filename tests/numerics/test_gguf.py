"""GGUF files, written by the `gguf` package: the header's configuration, the refusals, and transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from escala.schema.pretrained import model_config_of
from tests.numerics.test_huggingface import TOKENS, reference
from workloads.data.ends import generation_ends
from workloads.model.huggingface import load_pretrained

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Llama's q and k as llama.cpp's converter orders them: pairs of channels that RoPE turns lie side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write(path: Path, model: torch.nn.Module, architecture: str, more: dict[str, Any] | None = None) -> Path:
    """The fp32 GGUF file of a transformers model, as llama.cpp lays it out; `more` are further keys."""
    config, file = model.config, gguf.GGUFWriter(path, architecture)
    file.add_name("random")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(config.head_dim)
    if architecture == "qwen3":
        file.add_key_length(config.head_dim)
        file.add_value_length(config.head_dim)
    file.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    for key, value in (more or {}).items():
        add = {str: file.add_string, int: file.add_uint32, float: file.add_float32, list: file.add_array}
        add[type(value)](f"{architecture}.{key}", value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        file.add_tensor(name, tensor.numpy())
    for name in (more or {}).get("_tensors", []):
        file.add_tensor(name, np.ones(4, dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@pytest.mark.parametrize(
    ("kind", "architecture", "changes", "more"),
    [
        ("Llama", "llama", {"tie_word_embeddings": False}, {}),
        (
            "Mistral",
            "llama",
            {"sliding_window": 7, "tie_word_embeddings": True},
            {"attention.sliding_window": 7},
        ),
        ("Qwen3", "qwen3", {"head_dim": 16}, {}),
    ],
)
def test_a_gguf_file_gives_its_models_logits(
    kind: str, architecture: str, changes: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    theirs = reference(kind, **changes)
    path = write(tmp_path / "model.gguf", theirs, architecture, more)
    theirs.save_pretrained(tmp_path / "safetensors")
    assert model_config_of(path) == model_config_of(tmp_path / "safetensors")
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(path)(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"rope.scaling.type": "yarn"}, "scaled .yarn"),
        ({"rope.scale_linear": 4.0}, "scaled"),
        ({"_tensors": ["rope_freqs.weight"]}, "factors of each frequency"),
        ({"_tensors": ["blk.0.attn_q.bias"]}, "attn_q.bias"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"attention.key_length": 24}, "differ in size"),
        ({"attention.sliding_window": [4, 8]}, "differ in attention.sliding_window"),
    ],
)
def test_what_a_header_tells_and_we_cannot_do_is_refused(
    more: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf", reference("Llama"), "llama", more)
    with pytest.raises(ValueError, match=reason):
        model_config_of(path)


def test_a_headers_ends_of_generation_are_read(tmp_path: Path) -> None:
    path, file = tmp_path / "model.gguf", gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    file.add_token_list(["a", "b", "c"])
    file.add_eos_token_id(1)
    file.add_eot_token_id(2)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()
    assert generation_ends(path) == [1, 2]


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    whole = write(tmp_path / "model.gguf", reference("Llama"), "llama").read_bytes()
    for content, reason in [
        (b"not a model", "does not start with GGUF"),
        (whole[:4] + b"\1\0\0\0" + whole[8:], "version 1"),
        (whole[:200], "damaged"),
        (
            whole.replace(
                b"general.architecture\10\0\0\0\5\0\0\0\0\0\0\0llama",
                b"general.architecture\10\0\0\0\5\0\0\0\0\0\0\0bloom",
            ),
            "bloom",
        ),
    ]:
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            model_config_of(tmp_path / "bad.gguf")
    with pytest.raises(ValueError, match="can't be read"):
        model_config_of(tmp_path / "missing.gguf")
