"""The block-wise kinds of attention against their definitions over whole matrices, in float64; what features estimate;
and that nothing sees the future, to the last bit.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from escala.schema import ModelConfig
from escala.schema.flops import saved_elements_per_token
from tests.numerics.attention_reference import dense
from workloads.model.attention import make_attention
from workloads.model.attention.features import feature_map, random_rows
from workloads.model.attention.hybrid import NearAndFar
from workloads.model.attention.registry import AttentionModule
from workloads.model.transformer import Transformer

SIZE = 8
KINDS: dict[str, dict[str, Any]] = {
    "exact": {"attention": "exact"},
    "window": {"attention": "window", "window_tokens": 7},
    "wide window": {"attention": "window", "window_tokens": 150},
    "features": {"attention": "features", "features": {"count": 24}},
    "features, trigonometric": {"attention": "features", "features": {"kind": "trigonometric", "count": 256}},
    "features, learned": {"attention": "features", "features": {"kind": "learned", "count": 24}},
    "nystrom": {"attention": {"kind": "nystrom", "landmarks": 16, "ridge": 0.0}, "window_tokens": 32},
    "hybrid": {"attention": "hybrid", "window_tokens": 32, "features": {"count": 24}},
    "hybrid, blocks of several steps": {
        "attention": "hybrid",
        "window_tokens": 300,
        "features": {"count": 8},
    },
    "hybrid, trigonometric": {
        "attention": "hybrid",
        "window_tokens": 32,
        "features": {"kind": "trigonometric", "count": 256},
    },
    "hybrid, learned": {
        "attention": "hybrid",
        "window_tokens": 32,
        "features": {"kind": "learned", "count": 24},
    },
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def module_of(kind: str, kv_heads: int = 4, **changes: Any) -> tuple[AttentionModule, ModelConfig]:
    """With parameters that differ by head."""
    config = ModelConfig(d_model=4 * SIZE, n_heads=4, n_kv_heads=kv_heads, **{**KINDS[kind], **changes})
    torch.manual_seed(0)
    module = make_attention(config).double()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.3, 0.9)
    return module, config


def inputs(context: int, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    draw = (torch.randn(2, context, heads, SIZE, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    q, k, v = (each.requires_grad_() for each in draw)
    return q, k, v


def two_packings(context: int) -> Tensor:
    """Documents that cross blocks, lie within one, and end on a border."""
    position = torch.arange(context)
    borders = torch.tensor([5, 128, 300])
    return torch.stack([position // 101, (position[:, None] >= borders).sum(1)])


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@each_kind
def test_output_and_gradients_are_those_of_the_definition(kind: str, kv_heads: int, packed: bool) -> None:
    context = 403
    module, config = module_of(kind, kv_heads)
    q, k, v = inputs(context, kv_heads)
    documents = two_packings(context) if packed else None
    leaves = [q, k, v, *module.parameters()]
    found, wanted = module(q, k, v, documents), dense(module, config, q, k, v, documents)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)
    grad = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, leaves, grad, allow_unused=True),
        torch.autograd.grad(wanted, leaves, grad, allow_unused=True),
        strict=True,
    )
    for ours, theirs in pairs:
        reference = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, reference, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("kind", ["window", "features, learned", "nystrom", "hybrid"])
def test_gradients_are_finite_differences(kind: str) -> None:
    module, _ = module_of(
        kind, 2, **({"attention": {"kind": "nystrom", "landmarks": 4}} if kind == "nystrom" else {})
    )
    q, k, v = (each.detach()[:1, :70].requires_grad_() for each in inputs(70, 2))

    def run(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        out: Tensor = module(q, k, v)
        return out

    assert torch.autograd.gradcheck(run, (q, k, v, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "nystrom, few landmarks"])
def test_no_bit_of_the_past_depends_on_the_future_or_on_another_document(
    kind: str, dtype: torch.dtype, packed: bool
) -> None:
    """At borders of chunks (128), blocks (16, 150), windows, and next to them."""
    few = {"attention": {"kind": "nystrom", "landmarks": 3}}
    module, _ = module_of("nystrom", 2, **few) if kind.endswith("few landmarks") else module_of(kind, 2)
    module.to(dtype)
    context = 330
    q, k, v = (each.detach().to(dtype) for each in inputs(context, 2))
    documents = two_packings(context) if packed else None
    before = module(q, k, v, documents)
    for border in (1, 15, 16, 17, 33, 128, 129, 150, 256, 300, context - 1):
        changed = [each.clone() for each in (q, k, v)]
        for each in changed:
            each[:, border:] = each[:, border:] * -3 + 1
        assert torch.equal(module(*changed, documents)[:, :border], before[:, :border]), border
    if documents is None:
        return
    for row, border in ((0, 101), (0, 202), (1, 5), (1, 128), (1, 300)):
        changed = [each.clone() for each in (q, k, v)]
        for each in changed:
            each[row, :border] = each[row, :border] * -3 + 1
        assert torch.equal(module(*changed, documents)[row, border:], before[row, border:]), border


def test_a_document_that_comes_back_is_refused() -> None:
    module, _ = module_of("hybrid")
    with pytest.raises(ValueError, match="adjacent"):
        module(*inputs(6), torch.tensor([[0, 0, 1, 1, 0, 0]] * 2))


@pytest.mark.parametrize("kind", ["positive", "trigonometric"])
def test_features_are_unbiased_and_their_error_is_the_stated_one(kind: str) -> None:
    """10^5 draws of single rows: within three standard errors. Of M independent rows the relative variance is
    e^z (1 - e^-z) / M for the positive map with z = |x + y|^2; for the trigonometric one with R = M/2 rows
    (1 - e^-|x - y|^2)^2 / (2 R) times e^(|x|^2 + |y|^2 - 2 x.y).
    """
    torch.manual_seed(0)
    draws = 100_000
    x, y = (
        0.8 * torch.nn.functional.normalize(torch.randn(SIZE, dtype=torch.float64), dim=0) for _ in range(2)
    )
    rows = torch.randn(1, draws, SIZE, dtype=torch.float64)
    each = [feature_map(z.view(1, 1, 1, -1), kind, rows)[0, 0, 0] * math.sqrt(draws) for z in (x, y)]
    products = (each[0] * each[1]).view(-1, draws).sum(0)
    truth = float((x @ y).exp())
    error = float(products.std()) / math.sqrt(draws)
    assert abs(float(products.mean()) - truth) < 3 * error
    z, gap = float((x + y).square().sum()), float((x - y).square().sum())
    stated = math.exp(z) - 1 if kind == "positive" else math.exp(gap) * (1 - math.exp(-gap)) ** 2 / 2
    assert float(products.var()) / truth**2 == pytest.approx(stated, rel=0.1)


def test_orthogonal_rows_estimate_without_bias() -> None:
    """QR's own signs would favour some directions: 7 standard errors here."""
    rows = torch.cat([random_rows(4, 24, SIZE, seed, torch.device("cpu")) for seed in range(500)])
    first = rows[0, :SIZE]
    torch.testing.assert_close(first @ first.T, torch.diag(first.square().sum(-1)), atol=1e-12, rtol=0)
    assert float(rows.square().sum(-1).mean()) == pytest.approx(SIZE, rel=0.02)
    torch.manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(SIZE, dtype=torch.float64), dim=0) for _ in range(2))
    phi = [feature_map(z.expand(1, 1, len(rows), -1), "positive", rows)[0, 0] for z in (x, y)]
    errors = (phi[0] * phi[1]).sum(-1) - (x @ y).exp()
    assert abs(float(errors.mean())) < 3 * float(errors.std()) / math.sqrt(len(rows))


@pytest.mark.parametrize("kind", ["hybrid", "hybrid, trigonometric", "hybrid, learned", "nystrom"])
def test_two_blocks_are_exact_attention(kind: str) -> None:
    module, config = module_of(kind)
    q, k, v = inputs(config.window_tokens or 0)
    exact, _ = module_of("exact")
    torch.testing.assert_close(module(q, k, v), exact(q, k, v), atol=1e-12, rtol=1e-10)


def test_the_far_part_tends_to_exact_attention_as_features_grow() -> None:
    """q and k at norm S^(1/4), so that both parts have the same kernel: the error falls as M^(-1/2)."""
    q, k, v = (each.detach() for each in inputs(96))
    q, k = (torch.nn.functional.normalize(each, dim=-1) * SIZE**0.25 for each in (q, k))
    exact, _ = module_of("exact")
    errors = []
    for count in (64, 1024):
        squares = []
        for seed in range(6):
            features = {"count": count, "seed": seed}
            config = ModelConfig(
                d_model=4 * SIZE, n_heads=4, attention="hybrid", window_tokens=32, features=features
            )
            module = make_attention(config).double()
            squares.append(float((module(q, k, v) - exact(q, k, v)).detach().square().mean()))
        errors.append(math.sqrt(sum(squares) / len(squares)))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.35)  # sqrt(1024 / 64)


def test_scores_far_below_zero_do_not_overflow_where_nothing_is_far() -> None:
    """The far part's weight is relative to the whole sum, which is e^-200 here."""
    module, _ = module_of("hybrid")
    module.to(torch.float32)
    q, k, v = (each.detach().float()[:, :60] for each in inputs(60))
    k[:, :, :, 0], q[:, :, :, 0] = -30, 20
    q.requires_grad_()
    out = module(q, k, v)
    out.sum().backward()
    assert out.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_the_far_part_can_be_left_out() -> None:
    module, config = module_of("hybrid")
    assert isinstance(module, NearAndFar)
    q, k, v = inputs(100)
    with_far = module(q, k, v)
    module.is_far_bypassed = True
    without = module(q, k, v)
    border = config.window_tokens or 0
    torch.testing.assert_close(without[:, :border], with_far[:, :border], atol=1e-12, rtol=1e-10)
    assert not torch.allclose(without[:, border:], with_far[:, border:], atol=1e-3)


def test_a_denominator_is_never_below_what_the_kernel_has_at_least() -> None:
    """Two random cosines for 8 channels: an estimate of e^(x.y) that is often negative."""
    module, _ = module_of("hybrid, trigonometric", features={"kind": "trigonometric", "count": 2})
    q, k, v = inputs(400)
    out = module(q, k, v)
    out.sum().backward()
    assert out.isfinite().all()
    assert out.abs().max() < 50 * v.abs().max()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in (q, k, v))


def test_few_landmarks_err_more_than_many() -> None:
    q, k, v = inputs(200)
    exact_in_its_kernel, _ = module_of("nystrom")
    wanted = exact_in_its_kernel(q, k, v)
    errors = []
    for landmarks in (1, 4, 12):
        module, _ = module_of("nystrom", attention={"kind": "nystrom", "landmarks": landmarks, "ridge": 1e-6})
        errors.append(float((module(q, k, v) - wanted).square().mean()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["exact", "window", "features", "nystrom", "hybrid"])
def test_what_is_kept_for_the_backward_pass_is_what_memory_plans_say(kind: str, dtype: torch.dtype) -> None:
    """Storages that one more layer keeps, parameters apart, within 5 %."""
    context = 2048
    parts = {"d_model": 128, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, "max_context_tokens": context}
    configs = [ModelConfig(**parts, n_layers=layers, attention=kind) for layers in (1, 2)]
    one, two = (_kept_bytes(config, dtype, context) for config in configs)
    width = dtype.itemsize
    stated = saved_elements_per_token(configs[0], False, width).blocks
    assert (two - one) / width / context == pytest.approx(stated, rel=0.05)


def _kept_bytes(config: ModelConfig, dtype: torch.dtype, context: int) -> int:
    model = Transformer(config).to(dtype)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.hidden(torch.zeros(1, context, dtype=torch.int64))
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
