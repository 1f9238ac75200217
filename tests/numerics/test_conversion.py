"""Exact models into other kinds of attention: both phases, checkpoints, ZeRO stages, what the far part is worth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from escala.contract.errors import CheckpointError
from escala.contract.records import AttemptSpec
from escala.schema import ConvertConfig, ModelConfig
from escala.schema.flops import parameter_counts, trained_parameters
from tests.numerics.conversion_scenarios import config
from tests.numerics.ranks import run_ranks
from workloads.convert import prepare, transfer_error
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.tokenizer import train_tokenizer
from workloads.model.attention.layout import split_heads
from workloads.model.conversion import (
    _recorded,
    attention_states,
    converted,
    fit_gains,
    train_attention_alone,
)
from workloads.model.huggingface import save_pretrained
from workloads.model.transformer import Transformer
from workloads.training.far_part import FAR_PART_TAG, LEAST_WORTH_NATS, bypassed, with_far_part
from workloads.training.loss import distillation_loss
from workloads.training.task import Evaluation

EXACT = {
    "vocab_size": 300,
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_context_tokens": 64,
}
HYBRID = {"attention": "hybrid", "window_tokens": 16, "features": {"kind": "learned", "count": 8}}
KINDS = [{"attention": "window", "window_tokens": 16}, {"attention": "features"}, HYBRID]


def exact_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**EXACT))


def tokens(context: int = 64) -> torch.Tensor:
    return torch.randint(0, 300, (2, context), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["attention"])
def test_a_converted_model_has_the_exact_weights_and_new_ones_of_its_kind(kind: dict[str, Any]) -> None:
    exact = exact_model()
    model = converted(exact, ModelConfig(**EXACT, **kind))
    before, after = exact.state_dict(), model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(".attention.core." in name for name in after.keys() - before.keys())
    own = after["blocks.0.attention.query.weight"], after["blocks.0.feed_forward.up.weight"]
    theirs = before["blocks.0.attention.query.weight"], before["blocks.0.feed_forward.up.weight"]
    assert [a.data_ptr() == b.data_ptr() for a, b in zip(own, theirs, strict=True)] == [False, True]
    train_attention_alone(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = {"start": {"path": "/x"}, "model": EXACT, **kind}
    assert trained == trained_parameters(ConvertConfig(**plain))
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(model.config).n_total


def test_a_window_as_long_as_the_context_is_exact_and_leaves_no_error() -> None:
    exact = exact_model()
    model = converted(exact, ModelConfig(**EXACT, attention="window", window_tokens=64))
    assert torch.allclose(model(tokens()), exact(tokens()), atol=1e-5)
    assert transfer_error(model, exact, tokens()).item() < 1e-8


def test_the_transfer_compares_each_layer_on_the_exact_models_inputs() -> None:
    """Against each layer's attention called by hand; a layer's error reaches its own weights alone."""
    exact = exact_model()
    model = converted(exact, ModelConfig(**EXACT, **HYBRID))
    inputs, outputs = attention_states(exact, tokens())
    x = exact.embedding(tokens())
    assert torch.allclose(inputs[0], exact.layers[0].attention_norm(x), atol=1e-6)
    rotation = model._rotary(64, like=x)
    by_hand = [block.attention(one, rotation, None) for block, one in zip(model.layers, inputs, strict=True)]
    error = (torch.stack(by_hand) - outputs).square().mean() * tokens().numel()
    found = transfer_error(model, exact, tokens())
    assert found.item() == pytest.approx(error.item(), rel=1e-5)
    found.backward()
    moved = {
        name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)
    }
    assert "blocks.1.attention.core.sums.projection_GRS" in moved
    assert all(".attention." in name for name in moved)


@pytest.mark.parametrize(
    "far",
    [{"features": {"kind": "positive", "count": 64}}, {"attention": {"kind": "nystrom", "landmarks": 4}}],
)
def test_fitted_gains_give_far_keys_the_weight_of_exact_attention(far: dict[str, Any]) -> None:
    """By the normalisers of whole attention: of queries beyond the window, the mean log of far over near."""
    exact = exact_model()
    with torch.no_grad():
        for block in exact.layers:
            block.attention.query.weight.mul_(4)  # sharper: at a gain of 0 far keys weigh too much
    model = converted(exact, ModelConfig(**EXACT, **{**HYBRID, "features": None, **far}))
    before = transfer_error(model, exact, tokens()).item()
    fit_gains(model, exact, tokens())
    assert transfer_error(model, exact, tokens()).item() < before
    core = model.layers[0].attention.core
    inputs, _ = attention_states(exact, tokens())
    with _recorded([core]) as found:
        model.layers[0].attention(
            inputs[0], model._rotary(64, like=inputs), core.prepare(64, None, inputs.device)
        )
    (q, k, v, *_), _ = found[0]
    ratios = []
    for head in range(4):
        scores = q[:, :, head] @ k[:, :, head // 2].transpose(1, 2) / math.sqrt(8)
        far_keys = torch.arange(64)[:, None] // 8 - 2 >= torch.arange(64) // 8
        ratios.append(scores.masked_fill(~far_keys, -math.inf).logsumexp(-1)[:, 16:])
    q_NETS, k_NTS, v_NTS = split_heads(q, k, v)
    x, y, temperature = core.unit(q_NETS, k_NTS)
    _, denominator, log_scale = core.far(x, y, v_NTS, temperature, core.prepare(64, None, q.device))
    own = denominator.log() + (0 if log_scale is None else log_scale[:, None, None])
    by_hand = torch.stack(ratios, 1).view(4, 2, 48) - own[:, :, 16:]
    assert torch.allclose(core.gain_H, by_hand.view(2, 4, 48).mean((0, 2)), atol=1e-4)


def test_a_kind_without_a_far_part_has_no_gains_to_fit() -> None:
    model = converted(exact_model(), ModelConfig(**EXACT, attention="features"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fit_gains(model, exact_model(), tokens())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_the_transfer_brings_learned_features_towards_exact_attention() -> None:
    exact = exact_model()
    model = converted(
        exact, ModelConfig(**EXACT, attention="features", features={"kind": "learned", "count": 32})
    )
    train_attention_alone(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    errors = []
    for _ in range(40):
        optimizer.zero_grad()
        error = transfer_error(model, exact, tokens())
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]


def test_the_distillation_loss_is_cross_entropy_and_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workloads.training.loss.CHUNK_LOGITS", 40)  # several chunks
    torch.manual_seed(0)
    logits, exact = torch.randn(7, 20, dtype=torch.float64), torch.randn(7, 20, dtype=torch.float64)
    targets = torch.randint(0, 20, (7,))
    p, q = exact.softmax(-1), logits.softmax(-1)
    kl = (p * (p / q).log()).sum()
    cross_entropy = -q[torch.arange(7), targets].log().sum()
    found = distillation_loss(logits, exact, targets, 0.5)
    assert float(found) == pytest.approx(float(cross_entropy + 0.5 * kl), rel=1e-5)


def test_another_model_than_the_converted_ones_start_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not the converted model's"):
        converted(exact_model(), ModelConfig(**{**EXACT, "d_ff": 64}, **HYBRID))


def test_the_far_part_is_worth_what_leaving_it_out_costs() -> None:
    model = converted(exact_model(), ModelConfig(**EXACT, **HYBRID))

    def evaluate() -> Evaluation:
        with torch.no_grad():
            return Evaluation({"held_out_loss_nats": float(model(tokens()).square().mean())})

    with bypassed(model):
        without = evaluate().loss_nats
    found = with_far_part(evaluate(), model, model.config, 64, evaluate)
    assert without != evaluate().loss_nats
    assert found.measures["far_part_worth_nats"] == without - evaluate().loss_nats


@pytest.mark.parametrize(
    ("worth", "says"), [(LEAST_WORTH_NATS, True), (2 * LEAST_WORTH_NATS, False), (-1.0, True)]
)
def test_a_far_part_that_is_worth_nothing_is_said(worth: float, says: bool) -> None:
    config = ModelConfig(**EXACT, **HYBRID)
    losses = iter([3.0 + worth])
    found = with_far_part(
        Evaluation({"held_out_loss_nats": 3.0}),
        torch.nn.Identity(),
        config,
        64,
        lambda: Evaluation({"held_out_loss_nats": next(losses)}),
    )
    assert math.isclose(found.measures["far_part_worth_nats"], worth, rel_tol=1e-9)
    assert (FAR_PART_TAG in found.notices) is says


def test_without_a_far_part_there_is_no_worth_and_no_zero() -> None:
    def never() -> Evaluation:
        raise AssertionError("there is nothing to leave out")

    found = Evaluation({"held_out_loss_nats": 3.0})
    short = with_far_part(found, torch.nn.Identity(), ModelConfig(**EXACT, **HYBRID), 16, never)
    assert short.measures == {}
    assert "window_tokens is 16" in short.notices[FAR_PART_TAG]
    assert with_far_part(found, torch.nn.Identity(), ModelConfig(**EXACT), 64, never) is found


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an exact model in Hugging Face's layout, its tokenizer, text, and the text prepared."""
    directory = tmp_path_factory.mktemp("conversion")
    texts = [" ".join(f"{n * k % 89} times {k}" for k in range(120)) for n in range(40)]
    (directory / "text").mkdir()
    for number, text in enumerate(texts):
        (directory / "text" / f"{number}.txt").write_text(text)
    (directory / "tokenizer.json").write_text(train_tokenizer(texts, 300).to_str())
    tokenizer = load_chat_tokenizer(directory / "tokenizer.json")
    save_pretrained(exact_model(), directory / "start", tokenizer.end_of_text)
    tokenizer.save(directory / "start")
    plain = config(directory)
    spec = AttemptSpec(
        "job", 1, "t", "convert", "workloads.convert", plain, "", "", str(directory / "data"), "", "tests"
    )
    (directory / "prepared").write_text(prepare(spec, ConvertConfig(**plain)).path)
    return directory


def test_a_conversion_is_the_same_under_every_zero_stage_resumes_and_is_a_usable_model(start: Path) -> None:
    found, _ = run_ranks("conversion_scenarios:stages", 2, start)
    measures = [found[f"zero{stage}"]["measures"] for stage in range(4)]
    for other in measures[1:]:
        assert other == pytest.approx(measures[0], abs=2e-4)
    assert measures[0].keys() == {
        "exact_loss_nats",
        "gap_before_nats",
        "gap_after_nats",
        "far_part_worth_nats",
    }
    first = found["zero3"]
    assert first["initial_held_out_loss_nats"] - measures[3]["exact_loss_nats"] == pytest.approx(
        measures[3]["gap_before_nats"]
    )
    assert found["resumed"]["measures"] == first["measures"]  # bitwise
    assert first["n_trained"] < first["n_total"]
    assert all(".attention." in name for name in found["saved"])
    assert found["kind"] == "hybrid"
    assert all(found["same"].values())
