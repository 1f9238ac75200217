"""Advantages against float64 references in plain Python, a loop per sequence and token."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from workloads.alignment.advantages import gae, grpo, reinforce_plus_plus, rloo, to_tokens, whiten


def reference_gae(
    rewards: list[float], values: list[float], mask: list[int], gamma: float, lam: float, bootstrap: float
) -> tuple[list[float], list[float]]:
    """The definition as a sum over the valid tokens ahead, not as a recursion: eq. 16 of Schulman et al. 2016."""
    tokens = [t for t in range(len(mask)) if mask[t]]
    ahead = [values[t] for t in tokens[1:]] + [bootstrap]
    deltas = (
        [rewards[t] + gamma * following - values[t] for t, following in zip(tokens, ahead, strict=True)]
        if tokens
        else []
    )
    advantages = [0.0] * len(mask)
    for i, t in enumerate(tokens):
        advantages[t] = math.fsum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(deltas)))
    return advantages, [a + v if m else 0.0 for a, v, m in zip(advantages, values, mask, strict=True)]


numbers = st.floats(-10, 10)


@st.composite
def episodes(draw: st.DrawFn) -> dict[str, list]:
    rows, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    grid = {
        name: draw(st.lists(st.lists(kind, min_size=tokens, max_size=tokens), min_size=rows, max_size=rows))
        for name, kind in [("rewards", numbers), ("values", numbers), ("mask", st.integers(0, 1))]
    }
    return grid | {"bootstrap": draw(st.lists(numbers, min_size=rows, max_size=rows))}


@settings(deadline=None, max_examples=150)
@given(episodes(), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.0, math.nan, math.inf]))
def test_gae(episode: dict[str, list], gamma: float, lam: float, junk: float) -> None:
    expected = [
        reference_gae(*row, gamma, lam, bootstrap)
        for *row, bootstrap in zip(
            *(episode[k] for k in ("rewards", "values", "mask", "bootstrap")), strict=True
        )
    ]
    mask = torch.tensor(episode["mask"])
    rewards, values = (torch.where(mask.bool(), tensor(episode[k]), junk) for k in ("rewards", "values"))
    advantages, returns = gae(rewards, values, mask, gamma, lam, tensor(episode["bootstrap"]))
    assert_close(advantages, [a for a, _ in expected])
    assert_close(returns, [r for _, r in expected])
    assert not advantages[mask == 0].any()
    assert not returns[mask == 0].any()


def test_gae_without_bootstrap_ends_with_zero_and_fp32_agrees() -> None:
    rewards, values = normal(1), normal(2)
    rows = [reference_gae(*row, 0.99, 0.95, 0.0) for row in zip(rewards, values, MASK, strict=True)]
    for dtype in (torch.float64, torch.float32):
        advantages, returns = gae(tensor(rewards).to(dtype), tensor(values).to(dtype), mask_BT, 0.99, 0.95)
        assert advantages.dtype == returns.dtype == dtype
        assert_close(advantages, [a for a, _ in rows], 2e-6 if dtype == torch.float32 else 1e-12)
        assert_close(returns, [r for _, r in rows], 2e-6 if dtype == torch.float32 else 1e-12)


def test_gae_and_whitening_change_none_of_their_inputs() -> None:
    inputs = [tensor(normal(1)), tensor(normal(2)), mask_BT.clone(), tensor([0.5] * B)]
    before = [x.clone() for x in inputs]
    gae(*inputs[:3], 0.9, 0.8, inputs[3])
    whiten(inputs[0], inputs[2])
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def reference_whiten(rows: Rows) -> Rows:
    flat = [rows[r][t] for r in range(B) for t in valid(r)]
    mean = math.fsum(flat) / len(flat)
    scale = 1 / math.sqrt(math.fsum((x - mean) ** 2 for x in flat) / (len(flat) - 1) + 1e-8)
    return [[(rows[r][t] - mean) * scale if MASK[r][t] else 0.0 for t in range(T)] for r in range(B)]


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (1000.0, 1.0), (0.0, 1e-4)])
def test_whiten(offset: float, spread: float) -> None:
    rows = [[x + offset for x in row] for row in normal(4, spread)]
    assert_close(whiten(poison(tensor(rows), math.nan), mask_BT), reference_whiten(rows))
    as_fp32 = tensor(rows).float()  # the reference gets the same rounded numbers
    assert_close(whiten(as_fp32, mask_BT), reference_whiten(as_fp32.tolist()))


def test_whiten_of_one_token_and_of_none() -> None:
    one = torch.tensor([[3.0, math.nan]])
    assert whiten(one, torch.tensor([[1, 0]])).tolist() == [[0.0, 0.0]]
    assert whiten(one, torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def test_group_advantages() -> None:
    draw = random.Random(0)
    groups = [7, 3, 7, 3, 3, 11, 11, 7, 7]
    rewards = [draw.gauss(5, 2) for _ in groups]
    expected: dict[str, list[float]] = {"grpo": [], "dr": [], "rloo": []}
    for me, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        others = [r for i, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == group and i != me]
        everyone = [*others, reward]
        mean = sum(everyone) / len(everyone)
        std = math.sqrt(sum((r - mean) ** 2 for r in everyone) / (len(everyone) - 1))
        expected["grpo"].append((reward - mean) / (std + 1e-4))
        expected["dr"].append(reward - mean)
        expected["rloo"].append(reward - sum(others) / len(others))
    ids = torch.tensor(groups)
    assert_close(grpo(tensor(rewards), ids, eps=1e-4), expected["grpo"])
    assert_close(grpo(tensor(rewards), ids, by_std=False), expected["dr"])
    assert_close(rloo(tensor(rewards), ids), expected["rloo"])
    assert_close(rloo(tensor(rewards).float(), ids), expected["rloo"], 1e-5)


def test_equal_rewards_of_a_group_give_no_advantage() -> None:
    rewards, groups = torch.full((6,), 0.1), torch.zeros(6, dtype=torch.long)
    assert grpo(rewards, groups).abs().max() < 1e-9
    assert rloo(rewards, groups).abs().max() < 1e-9


def test_reinforce_plus_plus() -> None:
    rewards, gamma = normal(5), 0.9
    returns = [[0.0] * T for _ in range(B)]
    for row in range(B):
        for i, t in enumerate(valid(row)):
            returns[row][t] = sum(gamma**j * rewards[row][u] for j, u in enumerate(valid(row)[i:]))
    ours = reinforce_plus_plus(poison(tensor(rewards), math.nan), mask_BT, gamma)
    assert_close(ours, reference_whiten(returns))


def test_to_tokens() -> None:
    spread = to_tokens(tensor([1.0, 2, 3, 4, 5, 6]), mask_BT)
    assert spread.tolist() == [[float(m * (row + 1)) for m in MASK[row]] for row in range(B)]
