"""Drawing tokens: the right distribution, each row by itself, log-probabilities before any filter."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from escala.contract.errors import SpecError
from workloads.generation import sampling
from workloads.generation.protocol import SamplingParams
from workloads.generation.sampling import Draw, sample, uniforms

VOCAB = 12
ROWS = 20_000


def logits(seed: int = 0, width: int = VOCAB) -> Tensor:
    """One row, padded as the network pads it."""
    row = 1.5 * torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(row, (0, 64 - width), value=float("-inf"))[None]


def reference(row: Tensor, params: SamplingParams, seen: tuple[int, ...] = ()) -> Tensor:
    """The distribution by the definitions, one filter after the other, in fp64."""
    row = row.double().clone()
    for token in set(seen):
        row[token] = (
            row[token] / params.repetition_penalty
            if row[token] > 0
            else row[token] * params.repetition_penalty
        )
    probabilities = (row / params.temperature).softmax(-1)
    if params.top_k:
        keep = probabilities >= probabilities.sort(descending=True).values[params.top_k - 1]
        probabilities = probabilities * keep / (probabilities * keep).sum()
    if params.top_p < 1:
        keep, total = torch.zeros(len(row), dtype=torch.bool), 0.0
        for token in probabilities.argsort(descending=True).tolist():
            if total < params.top_p:
                keep[token] = True
            total += float(probabilities[token])
        probabilities = probabilities * keep / (probabilities * keep).sum()
    keep = probabilities >= params.min_p * probabilities.max()
    return probabilities * keep / (probabilities * keep).sum()


@pytest.mark.parametrize(
    ("params", "seen"),
    [
        (SamplingParams(), ()),
        (SamplingParams(temperature=0.6), ()),
        (SamplingParams(temperature=1.7, top_k=5), ()),
        (SamplingParams(top_p=0.8), ()),
        (SamplingParams(min_p=0.1), ()),
        (SamplingParams(temperature=1.3, repetition_penalty=1.8), (0, 3, 3, 7)),
        (SamplingParams(temperature=0.9, top_k=8, top_p=0.9, min_p=0.05, repetition_penalty=0.7), (1, 2)),
    ],
)
def test_chi_square(params: SamplingParams, seen: tuple[int, ...]) -> None:
    row = logits()
    expected = reference(row[0], params, seen).numpy()
    tokens, logprobs = sample(row.repeat(ROWS, 1), [Draw(params, n, seen) for n in range(ROWS)])
    counts = np.bincount(tokens, minlength=64)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert scipy.stats.chisquare(counts[kept], ROWS * expected[kept]).pvalue > 1e-3
    plain = (row[0] / params.temperature).log_softmax(-1)
    torch.testing.assert_close(torch.tensor(logprobs), plain[torch.tensor(tokens)], atol=1e-5, rtol=0)


def test_a_row_depends_on_nothing_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", 8)  # some nuclei end beyond it, some within
    rng = np.random.default_rng(0)
    rows = torch.cat([logits(seed, 60) for seed in range(40)])
    draws = [
        Draw(
            SamplingParams(
                temperature=float(rng.choice([0, 0.7, 1.0, 1.5])),
                top_k=int(rng.choice([0, 3, 20])),
                top_p=float(rng.choice([1.0, 0.3, 0.95])),
                min_p=float(rng.choice([0, 0.02])),
                repetition_penalty=float(rng.choice([1.0, 1.3])),
                seed=n,
            ),
            n % 3,
            range(n % 5),
        )
        for n in range(40)
    ]
    together, logprobs = sample(rows, draws)
    alone = [sample(rows[n : n + 1], draws[n : n + 1]) for n in range(40)]
    assert together == [tokens[0] for tokens, _ in alone]
    np.testing.assert_allclose(logprobs, [found[0] for _, found in alone], atol=1e-6)
    for row, draw, token in zip(rows, draws, together, strict=True):
        if draw.params.temperature:
            assert reference(row, draw.params, tuple(draw.seen))[token] > 0


def test_greedy_takes_the_lowest_of_equals_and_obeys_the_penalty() -> None:
    row = torch.full((1, 64), float("-inf"))
    row[0, :5] = torch.tensor([1.0, 3.0, 2.5, 3.0, 0.0])
    greedy = SamplingParams(temperature=0)
    tokens, logprobs = sample(row, [Draw(greedy, 0)])
    assert tokens == [1]
    assert logprobs[0] == pytest.approx(float(row.log_softmax(-1)[0, 1]), abs=1e-6)
    penalised = SamplingParams(temperature=0, repetition_penalty=1.5)
    tokens, logprobs = sample(row, [Draw(penalised, 0, (1, 3))])
    assert tokens == [2]
    assert logprobs[0] == pytest.approx(float(row.log_softmax(-1)[0, 2]), abs=1e-6)


def test_random_numbers_are_uniform_and_of_seed_and_count_alone() -> None:
    for numbers in (uniforms([5] * ROWS, range(ROWS)), uniforms(range(ROWS), [3] * ROWS)):
        assert 0 < numbers.min() < numbers.max() < 1
        assert scipy.stats.kstest(numbers, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 4 / ROWS**0.5
    assert uniforms([2**63 - 1, 4], [9, 2])[1] == uniforms([4], [2])[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": "word"},
    ],
)
def test_impossible_parameters_are_named(wrong: dict) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_random_numbers_are_splitmix64_s() -> None:
    """By Python's own integers, which know no sign."""
    mask = 2**64 - 1

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    golden, pairs = 0x9E3779B97F4A7C15, [(0, 0), (1, 7), (2**63 - 1, 12_345), (2**62 + 3, 2**40)]
    states = [mixed((mixed((s + golden) & mask) + (n + 1) * golden) & mask) for s, n in pairs]
    wanted = [((state >> 32) + 0.5) / 2**32 for state in states]
    assert uniforms([s for s, _ in pairs], [n for _, n in pairs]).tolist() == wanted
