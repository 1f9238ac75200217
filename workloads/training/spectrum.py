"""What the matrices hold while they are trained: entropy, stable rank, what truncation would lose (docs/theory E.2 to
E.4). Means, least and largest over all matrices, and the mean of each kind of matrix; one number a tensor would be too
many to look at.

Dimensions: O outputs, I inputs, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from workloads.model.compression.spectrum import active_entropy, code_entropy, randomized_svd
from workloads.model.moe import MixtureOfExperts
from workloads.model.weights import MASTER
from workloads.training import zero

RANK = 32
"""Of the randomised SVD: what is lost beyond it is `lost_at_rank_32`."""
FIGURES = ("entropy_bits", "stable_rank", f"lost_at_rank_{RANK}")


@dataclass(frozen=True)
class MatrixFigures:
    """One matrix's.

    Args:
        values: FIGURES; the stable rank from the sampled sigma_1, so at most `uncertainty` of it too high.
        uncertainty: 1 - sigma_1^2 / (the bound on sigma_1)^2, of a randomised SVD.
    """

    parameter: str
    kind: str
    weights: int
    values: tuple[float, ...]
    uncertainty: float


def spectrum_metrics(engine: Any, step: int) -> dict[str, float]:
    """Of every matrix that is trained, at every ZeRO stage: each rank is given a share of them, whole. A collective
    call; every rank has the result. Metrics are named spectrum/FIGURE, _min, _max, and spectrum/KIND/FIGURE.
    """
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(step)
    mine: list[MatrixFigures] = []
    names = [n for n, shape in zero.parameter_shapes(engine).items() if _is_matrix(n, shape)]
    for number, name in enumerate(names):
        whole = zero.gather_state(engine, name, MASTER, number % ranks)
        if whole is not None and number % ranks == rank:
            stack = whole if whole.dim() == 3 else whole[None]
            mine += [matrix_figures(name, weight_OI, generator) for weight_OI in stack]
    shared: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(shared, mine)
    found = [figures for part in shared for figures in part]
    return {**summarised(found), **_active(engine, found)} if found else {}


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) in (2, 3) and min(shape[-2:]) > 1 and ".router." not in name


def matrix_figures(name: str, weight_OI: Tensor, generator: torch.Generator | None = None) -> MatrixFigures:
    """Of one matrix. Raises SpecError where a weight is not finite."""
    weight_OI = weight_OI.detach()
    entropy, _ = code_entropy(weight_OI)
    svd = randomized_svd(weight_OI, min(RANK, *weight_OI.shape), generator)
    size, largest = float(weight_OI.double().norm()), float(svd.values_R[0])
    if size == 0:
        return MatrixFigures(name, _kind(name), weight_OI.numel(), (entropy, 0.0, 0.0), 0.0)
    values = (entropy, (size / largest) ** 2, svd.error / size)
    uncertainty = 1 - (largest / float(svd.upper_R[0])) ** 2
    return MatrixFigures(name, _kind(name), weight_OI.numel(), values, uncertainty)


def _kind(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def summarised(found: list[MatrixFigures]) -> dict[str, float]:
    """The metrics of all matrices. Entropy by weight; the others' means count each matrix once."""
    out: dict[str, float] = {}
    for at, figure in enumerate(FIGURES):
        values = [f.values[at] for f in found]
        out |= {
            f"spectrum/{figure}": _mean(found, at),
            f"spectrum/{figure}_min": min(values),
            f"spectrum/{figure}_max": max(values),
        }
        for kind in dict.fromkeys(f.kind for f in found):
            out[f"spectrum/{kind}/{figure}"] = _mean([f for f in found if f.kind == kind], at)
    return {**out, "spectrum/stable_rank_uncertainty": max(f.uncertainty for f in found)}


def _mean(found: list[MatrixFigures], at: int) -> float:
    by = [float(f.weights) if FIGURES[at] == "entropy_bits" else 1.0 for f in found]
    return math.fsum(w * f.values[at] for w, f in zip(by, found, strict=True)) / math.fsum(by)


def _active(engine: Any, found: list[MatrixFigures]) -> dict[str, float]:
    """Bits a weight of the experts that the last micro-batch's tokens met, mean over mixtures. A collective call."""
    entropies = []
    for prefix, layer in engine.module.named_modules():
        if not isinstance(layer, MixtureOfExperts) or layer.routing is None:
            continue
        load_E = layer.routing.load_E.detach().double().clone()
        torch.distributed.all_reduce(load_E)
        stacks: dict[str, list[float]] = {}
        for each in found:
            if each.parameter.startswith(f"{prefix}.experts."):
                stacks.setdefault(each.parameter, []).append(each.values[0])
        if stacks and float(load_E.sum()) > 0:
            entropy_E = torch.tensor(list(stacks.values())).mean(0)  # its three matrices are of one size
            entropies.append(active_entropy(load_E.cpu(), entropy_E))
    return {"spectrum/active_entropy_bits": sum(entropies) / len(entropies)} if entropies else {}
