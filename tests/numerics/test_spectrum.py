"""Entropy, singular values and truncation against closed forms; a randomised SVD against the whole one (E.2-E.4)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from escala.contract.errors import SpecError
from workloads.model.compression import quantize, spectrum
from workloads.model.compression.low_rank import truncate
from workloads.model.compression.spectrum import SCALE_BITS, active_entropy, randomized_svd

GRID = 1 << 18


def _of_rank(rank: int, outputs: int = 96, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """A matrix with known singular values 1, 1/2, 1/3, ..."""
    left, _ = torch.linalg.qr(torch.randn(outputs, rank, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(inputs, rank, dtype=torch.float64))
    values = 1 / torch.arange(1, rank + 1, dtype=torch.float64)
    return left * values @ right.T, values


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_a_matrix_of_known_rank_has_its_values_and_errors(rank: int) -> None:
    weight_OI, values = _of_rank(rank)
    found = spectrum(weight_OI)
    torch.testing.assert_close(found.singular_values[:rank], values, rtol=1e-9, atol=1e-9)
    assert float(found.singular_values[rank:].max()) < 1e-9
    assert found.stable_rank == pytest.approx(float(values.square().sum()), rel=1e-9)
    for kept in range(0, rank + 1, 4):
        assert found.truncation_error(kept) == pytest.approx(float(values[kept:].norm()), abs=1e-9)


def test_the_error_of_a_truncation_is_what_the_factors_lose() -> None:
    weight_OI = torch.randn(48, 80)
    lost = (weight_OI - truncate(weight_OI, 12).dequantize()).norm()
    # Factors in bf16 lose 2^-8 of what they hold, beside what is cut off.
    assert spectrum(weight_OI).truncation_error(12) == pytest.approx(float(lost), rel=2e-3)


def _gaussian(step: float) -> list[float]:
    edges = [math.erf((k - 0.5) * step / math.sqrt(2)) for k in range(-127, 129)]
    return [(high - low) / 2 for low, high in pairwise(edges)]


def _laplacian(step: float) -> list[float]:
    """Of density exp(-|x|)/2: a bin beside 0 is a geometric tail."""
    tail = [(math.exp(-(k - 0.5) * step) - math.exp(-(k + 0.5) * step)) / 2 for k in range(1, 128)]
    return [*reversed(tail), 1 - math.exp(-step / 2), *tail]


@pytest.mark.parametrize(("bins", "inverse"), [
    (_gaussian, lambda p: torch.special.ndtri(p)),
    (_laplacian, lambda p: -torch.sign(p - 0.5) * torch.log1p(-2 * (p - 0.5).abs())),
])  # fmt: skip
def test_the_entropy_of_a_quantile_grid_is_that_of_its_density_over_the_codes(bins, inverse) -> None:  # type: ignore[no-untyped-def]
    weight_OI = inverse((torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID).view(1, -1)
    step = float(quantize(weight_OI, 8).scale_OG)
    wanted = -sum(p * math.log2(p) for p in bins(step) if p > 0)
    found = spectrum(weight_OI)
    assert found.entropy_bits == pytest.approx(wanted, abs=1e-3)
    assert found.codelength_bits == pytest.approx(GRID * found.entropy_bits + SCALE_BITS)


def test_equal_weights_have_no_entropy_and_zeros_no_stable_rank() -> None:
    assert spectrum(torch.ones(4, 8)).entropy_bits == 0
    assert spectrum(torch.zeros(4, 8)).stable_rank == 0


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(120, 80), (64, 200)])
def test_a_randomised_svd_is_within_its_stated_error(decay: float, shape: tuple[int, int]) -> None:
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), dtype=torch.float64))
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    weight_OI = left * values @ right.T
    found = randomized_svd(weight_OI, 8, torch.Generator().manual_seed(3))
    lost = float((weight_OI - found.left_OR * found.values_R @ found.right_RI).norm())
    assert found.error == pytest.approx(lost, rel=1e-9)
    best = float(values[8:].norm())
    # Halko, Martinsson & Tropp 2011, theorem 10.5, without powers: with 10 columns more, in the mean.
    assert best * (1 - 1e-9) <= found.error <= math.sqrt(1 + 8 / 9) * best
    assert bool((found.values_R <= values[:8] * (1 + 1e-9)).all())
    assert bool((values[:8] <= found.upper_R).all())


def test_a_randomised_svd_of_a_known_rank_misses_nothing() -> None:
    weight_OI, values = _of_rank(6)
    found = randomized_svd(weight_OI, 6)
    assert found.missed < 1e-12
    torch.testing.assert_close(found.values_R, values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_is_none_is_refused(rank: int) -> None:
    with pytest.raises(SpecError, match="no rank"):
        randomized_svd(torch.randn(8, 9), rank)


def test_active_entropy_weighs_experts_by_how_often_they_are_met() -> None:
    assert active_entropy(torch.tensor([3, 1]), torch.tensor([4.0, 8.0])) == pytest.approx(5.0)
    with pytest.raises(SpecError, match="No expert"):
        active_entropy(torch.zeros(2), torch.ones(2))
