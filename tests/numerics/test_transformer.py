"""The transformer against Hugging Face's implementations with the same weights, and its own invariants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

from escala.schema import ModelConfig
from escala.schema.flops import parameter_counts
from workloads.model.layers import RMSNorm, _SwiGLU
from workloads.model.transformer import Transformer
from workloads.training import loss
from workloads.training.loss import token_loss

NAMES = {
    "model.embed_tokens": "embedding",
    "lm_head": "unembedding",
    "model.norm": "final_norm",
    "model.layers": "blocks",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
SMALL = {"vocab_size": 97, "n_layers": 2, "d_model": 48, "n_heads": 4, "d_ff": 80, "max_context_tokens": 64}


def from_reference(config: ModelConfig, kind: str, **more: object) -> tuple[Transformer, torch.nn.Module]:
    """Our model with the random weights of Hugging Face's `kind`, and that model."""
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        intermediate_size=config.ff_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
        initializer_range=0.2,  # large: a wrong detail shows
        **more,
    )
    torch.manual_seed(0)
    reference = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    state = {}
    for name, value in reference.state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = value + 0.1 * torch.randn_like(value) if "norm" in name else value
    theirs = {n: p for n, p in reference.named_parameters() if "norm" in n}
    for name, parameter in theirs.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        parameter.data.copy_(state[name])
    if config.tie_embeddings:
        state.pop("unembedding.weight", None)
    model = Transformer(config)
    model.load_state_dict(state)  # strict: every name is used
    return model, reference


@pytest.mark.parametrize(
    ("kind", "changes", "more"),
    [
        ("Llama", {"tie_embeddings": False}, {}),
        ("Llama", {"n_kv_heads": 2, "rope_base": 500.0}, {}),
        ("Qwen3", {"qk_norm": True, "head_dim": 16, "n_kv_heads": 1}, {}),
        ("Mistral", {"window_tokens": 7}, {"sliding_window": 7}),
    ],
)
def test_logits_and_gradients_equal_hugging_face(kind: str, changes: dict, more: dict) -> None:
    config = ModelConfig(**SMALL, **changes)
    model, reference = from_reference(config, kind, **more)
    tokens_BT = torch.randint(0, 97, (2, 33))
    ours, theirs = model(tokens_BT), reference(tokens_BT).logits
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    expected = reference.model.embed_tokens.weight.grad
    torch.testing.assert_close(model.embedding.weight.grad, expected, atol=1e-5, rtol=1e-3)
    expected = reference.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(model.blocks[0].attention.query.weight.grad, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_documents_equal_separate_passes(window: int | None) -> None:
    model = Transformer(ModelConfig(**SMALL, window_tokens=window))
    first, second = torch.randint(0, 97, (1, 9)), torch.randint(0, 97, (1, 14))
    documents_BT = torch.tensor([[0] * 9 + [1] * 14])
    packed = model(torch.cat((first, second), 1), documents_BT=documents_BT)
    separate = torch.cat((model(first), model(second)), 1)
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-4)
    positions_BT = torch.cat((torch.arange(9), torch.arange(14)))[None]
    again = model(torch.cat((first, second), 1), positions_BT, documents_BT)
    torch.testing.assert_close(again, separate, atol=1e-5, rtol=1e-4)


def test_no_token_sees_its_future() -> None:
    model = Transformer(ModelConfig(**SMALL, qk_norm=True))
    tokens_BT = torch.randint(0, 97, (2, 20))
    changed = tokens_BT.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 97
    before, after = model(tokens_BT), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11])
    assert (before[:, 11:] - after[:, 11:]).abs().min(dim=-1).values.max() > 0


def test_a_window_forgets_exactly_what_lies_before_it() -> None:
    model = Transformer(ModelConfig(**{**SMALL, "n_layers": 1}, window_tokens=5))
    tokens_BT = torch.randint(0, 97, (1, 20))
    for distance, same in ((4, False), (5, True)):
        changed = tokens_BT.clone()
        changed[0, 19 - distance] = (changed[0, 19 - distance] + 1) % 97
        assert torch.equal(model(tokens_BT)[0, 19], model(changed)[0, 19]) == same


def test_recomputed_activations_give_the_same_gradients_and_all_are_finite() -> None:
    model = Transformer(ModelConfig(**SMALL, n_kv_heads=2, qk_norm=True, tie_embeddings=False))
    tokens_BT = torch.randint(0, 97, (2, 16))
    gradients = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        model.zero_grad()
        token_loss(model(tokens_BT), tokens_BT)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.isfinite(plain).all()
        assert plain.abs().sum() > 0
        assert torch.equal(plain, recomputed)


def test_hand_written_gradients_pass_gradcheck_and_match_torch() -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(_SwiGLU.apply, (gate, up))
    norm = RMSNorm(8, 1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    grad = torch.randn(3, 5, 8)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        here, there = (x.detach().to(dtype).requires_grad_() for _ in range(2))
        wanted = F.rms_norm(there.float(), (8,), norm.weight, 1e-5).to(dtype)
        norm.zero_grad()
        norm(here).backward(grad.to(dtype))
        ours = norm.weight.grad.clone()
        norm.zero_grad()
        wanted.backward(grad.to(dtype))
        torch.testing.assert_close(norm(here), wanted, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(here.grad, there.grad, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(ours, norm.weight.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameter_counts_are_the_built_models(tied: bool, qk_norm: bool) -> None:
    config = ModelConfig(**SMALL, tie_embeddings=tied, qk_norm=qk_norm, n_kv_heads=2, head_dim=8)
    with torch.device("meta"):
        model = Transformer(config)
    counts = parameter_counts(config)
    assert counts.n_total == counts.n_active == sum(p.numel() for p in model.parameters())
    embeddings = [p for n, p in model.named_parameters() if "embedding" in n]
    assert counts.n_non_embedding == counts.n_total - sum(p.numel() for p in embeddings)


def test_a_seed_draws_the_same_model_and_residual_projections_are_small() -> None:
    config = ModelConfig(**{**SMALL, "d_model": 128, "d_ff": 256})
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(Transformer(config))
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    block = models[0].blocks[0]
    assert block.feed_forward.up.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    down = block.feed_forward.down.weight.std().item()
    assert down == pytest.approx(256**-0.5 / 2, rel=0.05)  # / sqrt(2 x 2 layers)


def test_a_model_from_the_meta_device_computes_the_same() -> None:
    model = Transformer(ModelConfig(**SMALL))
    with torch.device("meta"):
        empty = Transformer(model.config)
    assert empty(torch.zeros(2, 8, dtype=torch.long, device="meta")).shape == (2, 8, 97)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    tokens_BT = torch.randint(0, 97, (1, 8))
    assert torch.equal(empty(tokens_BT), model(tokens_BT))
    assert torch.equal(model.logits(model.hidden(tokens_BT)), model(tokens_BT))
    assert model.auxiliary_losses() == {}


def test_token_loss_is_cross_entropy_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(3, 7, 11, requires_grad=True), torch.randint(0, 11, (3, 7))
    mask = torch.rand(3, 7) < 0.5
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    for chunk in (1 << 21, 40):
        monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
        total, count = token_loss(logits, targets)
        torch.testing.assert_close(total, expected.sum())
        assert count == 21
        total, count = token_loss(logits, targets, mask)
        torch.testing.assert_close(total, (expected * mask).sum())
        assert count == mask.sum()
        total, count = token_loss(logits, targets, torch.tensor([[True], [False], [True]]))
        torch.testing.assert_close(total, expected[[0, 2]].sum())
        assert count == 14
