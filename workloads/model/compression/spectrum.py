"""What a matrix holds: the entropy of its codes, its singular values, and what truncation loses (docs/theory E.2-E.4).

Dimensions: O outputs, I inputs, R rank, E experts, S probes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from escala.contract.errors import SpecError
from workloads.model.compression.quantize import quantize
from workloads.model.compression.quantized import SIGNED_BITS

SCALE_BITS = 16
"""Of a stored scale."""
OVERSAMPLING, POWERS, BOUND_POWERS = 10, 2, 4
"""Columns beyond the rank, and products with W W^T: Halko, Martinsson & Tropp (2011) advise 5 to 10, and 1 or 2;
q of the bound below."""
PROBES = 5
"""Random vectors that bound what a randomised SVD leaves: the bound fails with probability 10^-5 at most."""


@dataclass(frozen=True)
class Spectrum:
    """A matrix's singular values and the entropy of its 8-bit codes.

    Args:
        singular_values: float64, the largest first, min(O, I) of them.
        stable_rank: ||W||_F^2 / sigma_1^2; 0 of a matrix of zeros.
        entropy_bits: of the codes as they are distributed in the matrix, in bits a weight.
        codelength_bits: weights x entropy, and the scales.
    """

    singular_values: Tensor
    stable_rank: float
    entropy_bits: float
    codelength_bits: float

    def truncation_error(self, rank: int) -> float:
        """||W - W_R||_F of the best approximation of `rank` (Eckart & Young 1936): exact. Raises SpecError for a rank
        below 0.
        """
        if rank < 0:
            raise SpecError(f"There is no rank {rank}.", "Give 0 or more.")
        return float(self.singular_values[rank:].square().sum().sqrt())


def spectrum(weight_OI: Tensor) -> Spectrum:
    """The spectrum of a matrix, its codes signed and of 8 bits, a scale for each output (docs/theory E.2, E.3).

    Raises SpecError where a weight is not finite.
    """
    entropy, scales = code_entropy(weight_OI)
    values = torch.linalg.svdvals(weight_OI.detach().double())
    largest = float(values[0])
    stable = float(values.square().sum()) / largest**2 if largest > 0 else 0.0
    return Spectrum(values, stable, entropy, weight_OI.numel() * entropy + SCALE_BITS * scales)


def code_entropy(weight_OI: Tensor) -> tuple[float, int]:
    """(bits a weight of the 8-bit codes' own distribution, scales that stand beside them). Raises SpecError."""
    stored = quantize(weight_OI, SIGNED_BITS)
    counts = torch.bincount(stored.codes.flatten().long() + 128, minlength=256).double()
    shares = counts[counts > 0] / stored.codes.numel()
    return max(0.0, -float((shares * shares.log2()).sum())), stored.scale_OG.numel()


def active_entropy(chosen_E: Tensor, entropy_E: Tensor) -> float:
    """sum_r Pr(r) H(theta_r): the bits a weight of the expert that a token meets (docs/theory E.4).

    Args:
        chosen_E: how often each expert was chosen, or its probability; only the proportions count.
        entropy_E: of each expert's weights, in bits a weight.

    Raises SpecError where no expert was chosen.
    """
    total = float(chosen_E.sum())
    if not total > 0:
        raise SpecError("No expert was chosen.", "Count the choices over some tokens first.")
    return float((chosen_E.double() * entropy_E.double()).sum()) / total


@dataclass(frozen=True)
class RandomizedSvd:
    """W ~ left_OR diag(values_R) right_RI, and how far off it is.

    Args:
        values_R: the largest first; none is above the matrix's own (in exact arithmetic).
        error: ||W - left diag(values) right||_F, exact.
        missed: bound on the largest singular value of what the sampled space leaves, so that each of the matrix's is at
            most sqrt(values^2 + missed^2). It fails with probability 10^-PROBES at most.
    """

    left_OR: Tensor
    values_R: Tensor
    right_RI: Tensor
    error: float
    missed: float

    @property
    def upper_R(self) -> Tensor:
        """What the matrix's singular values are at most; `values_R` is what they are at least."""
        return (self.values_R.square() + self.missed**2).sqrt()


def randomized_svd(weight_OI: Tensor, rank: int, generator: torch.Generator | None = None) -> RandomizedSvd:
    """The leading `rank` singular triplets by a random sample of the matrix's range (Halko, Martinsson & Tropp 2011,
    algorithms 4.4 and 5.1), with its error.

    The error is that of the sampled space, B = W - Q Q^T W, and of the values beyond `rank` in it. `missed` is their
    equation 4.3 for powers of B: ||B|| <= (10 sqrt(2/pi) max_i ||B (B^T B)^q w_i||)^(1/(2q+1)), or ||B||_F where that
    is smaller. All in float64.

    Raises SpecError where the matrix has no such rank.
    """
    if not 1 <= rank <= min(weight_OI.shape):
        raise SpecError(
            f"A matrix of {tuple(weight_OI.shape)} has no rank {rank}.", f"Give 1 to {min(weight_OI.shape)}."
        )
    weight_OI = weight_OI.detach().double()
    inputs, sampled = weight_OI.shape[1], min(rank + OVERSAMPLING, *weight_OI.shape)
    basis_OR = _orthogonal(weight_OI @ _normal(inputs, sampled, generator, weight_OI))
    for _ in range(POWERS):
        basis_OR = _orthogonal(weight_OI @ _orthogonal(weight_OI.T @ basis_OR))
    projected_RI = basis_OR.T @ weight_OI
    small_RR, values, right = torch.linalg.svd(projected_RI, full_matrices=False)
    rest_OI = weight_OI - basis_OR @ projected_RI
    rest = float(rest_OI.norm())
    error = math.hypot(rest, float(values[rank:].norm()))
    missed = min(rest, _norm_bound(rest_OI, _normal(inputs, PROBES, generator, weight_OI)))
    return RandomizedSvd((basis_OR @ small_RR)[:, :rank], values[:rank], right[:rank], error, missed)


def _normal(rows: int, columns: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Drawn on the CPU, so that a seed gives the same sample on every device."""
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype).to(like.device)


def _orthogonal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _norm_bound(rest_OI: Tensor, probes_IS: Tensor) -> float:
    """Of the spectral norm of B, the rest."""
    scale, found_OS = 1.0, rest_OI @ probes_IS
    power = 2 * BOUND_POWERS + 1
    for _ in range(BOUND_POWERS):  # rescaled, since it falls with the power of B
        size = float(found_OS.norm())
        if size == 0:
            return 0.0
        scale *= math.pow(size, 1 / power)
        found_OS = rest_OI @ (rest_OI.T @ (found_OS / size))
    largest = float(found_OS.norm(dim=0).max())
    return scale * math.pow(10 * math.sqrt(2 / math.pi) * largest, 1 / power)
