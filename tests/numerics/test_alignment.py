"""The losses of PPO and of preference training against float64 references in plain Python, a loop per sequence and
token. Gradients against derivatives by hand, and finite differences.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.numerics.alignment_batch import (
    MASK,
    B,
    Rows,
    T,
    assert_close,
    mask_BT,
    normal,
    poison,
    tensor,
    valid,
)
from workloads.alignment import losses
from workloads.alignment.losses import (
    bradley_terry,
    clip_fraction,
    dpo_loss,
    entropy,
    importance_weights,
    kl,
    kl_loss,
    loss_count,
    policy_loss,
    value_loss,
)

MODES = ["token", "sequence_mean", "gspo"]
SEEDS = range(6)


def token_weight(row: int, mode: str) -> float:
    """What one token's loss counts for in the whole."""
    if mode == "token":
        return 1 / sum(map(sum, MASK))
    return 1 / sum(any(other) for other in MASK) / len(valid(row))


def reference_policy(
    logp: Rows, old: Rows, advantages: Rows, low: float, high: float, dual: float | None, mode: str
) -> tuple[float, Rows]:
    """The loss and its derivative by each logp: zero where a constant branch holds."""
    total, gradient = [], [[0.0] * T for _ in range(B)]
    for row in range(B):
        tokens = valid(row)
        groups = [tokens] if mode == "gspo" and tokens else [[t] for t in tokens]
        for group in groups:
            log_ratio = sum(logp[row][t] - old[row][t] for t in group) / len(group)
            ratio = math.exp(max(-20.0, min(20.0, log_ratio)))
            clipped = max(1 - low, min(1 + high, ratio))
            for t in group:
                a = advantages[row][t]
                loss, moves = -ratio * a, abs(log_ratio) < 20
                if clipped * a < ratio * a:
                    loss, moves = -clipped * a, False
                if dual is not None and a < 0 and loss > -dual * a:
                    loss, moves = -dual * a, False
                total.append(loss * token_weight(row, mode))
                for other in group:
                    gradient[row][other] -= moves * ratio * a * token_weight(row, mode) / len(group)
    return math.fsum(total), gradient


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("spread", [0.05, 0.5, 8.0, 100.0])
def test_policy_loss_and_gradient(mode: str, dual: float | None, spread: float) -> None:
    for seed in SEEDS:
        logp, old, advantages = normal(seed, spread), normal(seed + 100), normal(seed + 200)
        ours = tensor(logp, gradient=True)
        loss = policy_loss(ours, tensor(old), tensor(advantages), mask_BT, 0.2, 0.3, dual, mode)
        loss.backward()
        value, gradient = reference_policy(logp, old, advantages, 0.2, 0.3, dual, mode)
        assert_close(loss, value)
        assert_close(ours.grad, gradient)


@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_in_fp32_and_by_finite_differences(mode: str) -> None:
    logp, old, advantages = normal(1, 0.3), normal(2, 0.3), tensor(normal(3))
    value, _ = reference_policy(logp, old, advantages.tolist(), 0.2, 0.2, None, mode)
    single = policy_loss(
        tensor(logp).float(), tensor(old).float(), advantages.float(), mask_BT, 0.2, 0.2, mode=mode
    )
    assert_close(single, value)

    def loss(x: Tensor) -> Tensor:
        return policy_loss(x, tensor(old), advantages, mask_BT, 0.2, 0.2, mode=mode)

    assert torch.autograd.gradcheck(loss, tensor(logp, gradient=True))


@pytest.mark.parametrize("difference", [-100.0, 100.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_extreme_ratios_are_finite_and_train_nothing(difference: float, advantage: float) -> None:
    logp = torch.full((1, 1), difference, requires_grad=True)
    loss = policy_loss(logp, torch.zeros(1, 1), torch.full((1, 1), advantage), torch.ones(1, 1), 0.2, 0.2)
    loss.backward()
    expected = {(100.0, 1.0): -1.2, (100.0, -1.0): math.exp(20), (-100.0, 1.0): -math.exp(-20)}
    assert loss.item() == pytest.approx(expected.get((difference, advantage), 0.8), rel=1e-6)
    assert logp.grad.item() == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_clip_fraction(mode: str) -> None:
    shares = []
    for seed in SEEDS:
        logp, old, advantages = normal(seed, 0.6), normal(seed + 10, 0.1), normal(seed + 20)
        share = 0.0
        for row in range(B):
            for t in valid(row):
                group = valid(row) if mode == "gspo" else [t]
                ratio = math.exp(sum(logp[row][u] - old[row][u] for u in group) / len(group))
                a = advantages[row][t]
                share += ((a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.8)) * token_weight(row, mode)
        ours = clip_fraction(tensor(logp), tensor(old), tensor(advantages), mask_BT, 0.2, 0.3, mode)
        assert_close(ours, share)
        shares.append(share)
    assert 0 < max(shares) < 1


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_and_gradient(clip: float | None) -> None:
    for seed in SEEDS:
        values, old, returns = normal(seed), normal(seed + 1, 1.5), normal(seed + 2)
        number = sum(map(sum, MASK))
        total, gradient = 0.0, [[0.0] * T for _ in range(B)]
        for row in range(B):
            for t in valid(row):
                v, r, bound = values[row][t], returns[row][t], clip if clip is not None else math.inf
                clipped = max(old[row][t] - bound, min(old[row][t] + bound, v))
                total += 0.5 * max((v - r) ** 2, (clipped - r) ** 2) / number
                if clipped == v or (v - r) ** 2 > (clipped - r) ** 2:
                    gradient[row][t] = (v - r) / number
        ours = tensor(values, gradient=True)
        loss = value_loss(ours, tensor(old), tensor(returns), mask_BT, clip)
        loss.backward()
        assert_close(loss, total)
        assert_close(ours.grad, gradient)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


DIFFERENCES = [-200.0, -50.0, -1.0, 0.0, 0.3, 40.0, 200.0]


@pytest.mark.parametrize("margin", [0.0, 1.5, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bradley_terry_to_200_nats(margin: float | list[float], dtype: torch.dtype) -> None:
    number = len(DIFFERENCES)
    margins = margin if isinstance(margin, list) else [margin] * number
    chosen = torch.tensor([0.25 + d for d in DIFFERENCES], dtype=dtype, requires_grad=True)
    rejected = torch.full((number,), 0.25, dtype=dtype, requires_grad=True)
    given_margin = torch.tensor(margin, dtype=dtype) if isinstance(margin, list) else margin
    loss = bradley_terry(chosen, rejected, given_margin)
    loss.backward()
    lead = [d - m for d, m in zip(DIFFERENCES, margins, strict=True)]
    assert_close(loss, math.fsum(softplus(-x) for x in lead) / number)
    assert_close(chosen.grad, [-sigmoid(-x) / number for x in lead])
    assert_close(rejected.grad, [sigmoid(-x) / number for x in lead])
    if dtype == torch.float64 and margin == 0.0:
        last = bradley_terry(chosen[-1:], rejected[-1:])
        assert last.item() == pytest.approx(math.exp(-200), rel=1e-6)  # not rounded to zero


def test_dpo_loss_and_gradient() -> None:
    draw = random.Random(0)
    rows = [[draw.gauss(-50, scale) for _ in range(5)] for scale in (20, 20, 30, 400)]
    tensors = [tensor(row, gradient=True) for row in rows]
    loss = dpo_loss(*tensors, 0.1)
    loss.backward()
    lead = [0.1 * ((c - rc) - (r - rr)) for c, r, rc, rr in zip(*rows, strict=True)]
    assert_close(loss, math.fsum(softplus(-x) for x in lead) / 5)
    assert_close(tensors[0].grad, [-0.1 * sigmoid(-x) / 5 for x in lead])
    assert_close(tensors[1].grad, [0.1 * sigmoid(-x) / 5 for x in lead])
    assert [x.grad for x in tensors[2:]] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_estimators_and_their_gradients(dtype: torch.dtype) -> None:
    d = [-100.0, -20.5, -3.0, -2.0, -1e-3, 0.0, 1e-3, 0.5, 5.0, 10.5, 12.0, 100.0]
    k3 = [min(10.0, math.exp(-x) - 1 + x) for x in d]
    expected = {"k1": d, "k2": [x * x / 2 for x in d], "k3": k3}
    slopes = {
        "k1": [1.0] * len(d),
        "k2": d,
        "k3": [1 - math.exp(-x) if k < 10 else 0.0 for x, k in zip(d, k3, strict=True)],
    }
    for kind in expected:
        logp = torch.tensor([d], dtype=dtype, requires_grad=True)
        estimate = kl(logp, torch.zeros_like(logp), kind)
        estimate.sum().backward()
        assert_close(estimate, [expected[kind]])
        assert_close(logp.grad, [slopes[kind]])
    assert (kl(torch.randn(1, 1000) * 1e-4, torch.zeros(1, 1000), "k3") >= 0).all()


def reference_kl_gradients(kind: str) -> tuple[list[float], list[float]]:
    """(expected gradient of the estimator by the policy's logits, on its own samples; gradient that it stands for)."""
    logits, reference = [0.3, -1.0, 0.8], [0.0, 0.5, -0.2]
    z, zr = sum(map(math.exp, logits)), sum(map(math.exp, reference))
    p, q = [math.exp(x) / z for x in logits], [math.exp(x) / zr for x in reference]
    x = tensor(logits, gradient=True)
    expectation = (tensor(p) * kl(x.log_softmax(0)[None], tensor(q).log()[None], kind)[0]).sum()
    (gradient,) = torch.autograd.grad(expectation, x)
    forward = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    stands_for = {
        "k1": [0.0] * 3,
        "k2": [a * (math.log(a / b) - forward) for a, b in zip(p, q, strict=True)],
        "k3": [a - b for a, b in zip(p, q, strict=True)],
    }
    return gradient.tolist(), stands_for[kind]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_each_estimator_has_the_gradient_that_the_specification_names(kind: str) -> None:
    expected, stands_for = reference_kl_gradients(kind)
    assert expected == pytest.approx(stands_for, abs=1e-12)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_loss(kind: str) -> None:
    logp, reference = normal(1), normal(2)
    terms = [logp[r][t] - reference[r][t] for r in range(B) for t in valid(r)]
    each = [d * d / 2 if kind == "k2" else min(10.0, math.exp(-d) - 1 + d) for d in terms]
    assert_close(kl_loss(tensor(logp), tensor(reference), mask_BT, kind), sum(each) / len(each))


def test_entropy_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_rows", lambda logits: 2)  # two rows of five at a time
    draw = random.Random(0)
    rows = [[[draw.gauss(0, 3) for _ in range(5)] for _ in range(T)] for _ in range(B)]
    total = []
    for r in range(B):
        for t in valid(r):
            normaliser = math.fsum(math.exp(z) for z in rows[r][t])
            p = [math.exp(z) / normaliser for z in rows[r][t]]
            total.append(-math.fsum(x * math.log(x) for x in p))
    logits = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    assert_close(entropy(logits, mask_BT), math.fsum(total) / len(total))
    assert torch.autograd.gradcheck(lambda x: entropy(x, mask_BT), logits)


def test_entropy_of_forbidden_tokens_and_peaks() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf], [500.0, 0.0, 0.0]]], requires_grad=True)
    value = entropy(logits, torch.ones(1, 2))
    value.backward()
    assert value.item() == pytest.approx(math.log(2) / 2)
    assert logits.grad.abs().max() < 1e-7  # each is at a maximum or a corner
    assert entropy(logits, torch.zeros(1, 2)).item() == 0.0


def test_importance_weights_are_truncated() -> None:
    logp, engine = normal(1), normal(2)
    ours = importance_weights(poison(tensor(logp), math.nan), tensor(engine), mask_BT, 1.5)
    expected = [
        [min(1.5, math.exp(logp[r][t] - engine[r][t])) if MASK[r][t] else 0.0 for t in range(T)]
        for r in range(B)
    ]
    assert_close(ours, expected)


def masked_losses() -> dict[str, Callable[..., Tensor]]:
    """Every masked loss as a function of three (B, T) tensors."""
    named = {
        f"policy-{mode}-{dual}": lambda x, y, z, mode=mode, dual=dual: policy_loss(
            x, y, z, mask_BT, 0.2, 0.2, dual, mode
        )
        for mode in MODES
        for dual in (None, 3.0)
    }
    named |= {
        f"value-{clip}": lambda x, y, z, clip=clip: value_loss(x, y, z, mask_BT, clip) for clip in (None, 0.2)
    }
    named |= {kind: lambda x, y, z, kind=kind: kl_loss(x, y, mask_BT, kind) for kind in ("k2", "k3")}
    return named | {"entropy": lambda x, y, z: entropy(torch.stack([x, y, z], dim=-1), mask_BT)}


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", list(masked_losses()))
def test_what_a_masked_slot_holds_changes_nothing(name: str, junk: float) -> None:
    loss = masked_losses()[name]
    clean = [tensor(normal(seed), gradient=True) for seed in (1, 2, 3)]
    dirty = [poison(x, junk) for x in clean]
    values = []
    for inputs in (clean, dirty):
        values.append(loss(*inputs))
        values[-1].backward()
    assert torch.equal(values[0], values[1])
    assert torch.equal(clean[0].grad, dirty[0].grad)
    assert clean[0].grad.abs().sum() > 0
    assert (dirty[0].grad[~mask_BT] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up_to_one_large_batch(mode: str) -> None:
    names = ("policy", "value", "entropy", "kl")
    logp, old, advantages = (tensor(normal(seed, 0.4)).float() for seed in (1, 2, 3))
    logits = torch.randn(B, T, 11)

    def all_losses(x: Tensor, rows: slice) -> dict[str, tuple[Tensor, Tensor]]:
        mask, shift = mask_BT[rows], x[rows]
        return {
            "policy": (
                policy_loss(shift, old[rows], advantages[rows], mask, 0.2, 0.2, None, mode),
                loss_count(mask, mode),
            ),
            "value": (value_loss(shift, old[rows], advantages[rows], mask, 0.2), loss_count(mask)),
            "entropy": (entropy(logits[rows] * shift.unsqueeze(-1), mask), loss_count(mask)),
            "kl": (kl_loss(shift, old[rows], mask, "k3"), loss_count(mask)),
        }  # fmt: skip

    for name in names:
        whole, parts = logp.clone().requires_grad_(), logp.clone().requires_grad_()
        loss, number = all_losses(whole, slice(0, B))[name]
        loss.backward()
        total = torch.zeros(())
        for rows in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6)):  # the third has no valid token
            part, count = all_losses(parts, rows)[name]
            (part * count / number).backward()
            total += part.detach() * count / number
        torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-6, atol=1e-6)
