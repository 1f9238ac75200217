"""What `escala compress` shows: a table of tensors, and a plot. Matplotlib without pyplot: no display, no global state.

Dimensions: E experts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

from workloads.model.compression.spectrum import Spectrum, active_entropy, spectrum

RANK_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Ranks at which the table says what truncation loses, as shares of the full one."""
COLUMNS = [
    "matrix",
    "outputs",
    "inputs",
    "entropy_bits",
    "codelength_bytes",
    "stable_rank",
    "largest_singular_value",
    *(f"lost_at_rank_1/{round(1 / share)}" for share in RANK_SHARES),
]
KINDS = ("query", "key", "value", "output", "gate", "up", "down", "unembedding")


@dataclass(frozen=True)
class TensorTable:
    """The spectrum of each matrix, by name."""

    spectra: Mapping[str, Spectrum]
    shapes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> TensorTable:
        """Of every matrix. Raises SpecError where a weight is not finite."""
        return cls(
            {name: spectrum(weight) for name, weight in weights.items()},
            {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()},
        )

    def rows(self) -> list[list[object]]:
        """A row a matrix, in the order of COLUMNS; what is lost is ||W - W_R||_F / ||W||_F, exact."""
        return [self._row(name) for name in self.spectra]

    def _row(self, name: str) -> list[object]:
        found, full = self.spectra[name], min(self.shapes[name])
        size = found.truncation_error(0)
        lost = [
            found.truncation_error(max(1, round(share * full))) / size if size else 0.0
            for share in RANK_SHARES
        ]
        codelength = found.codelength_bits / 8
        return [
            name,
            *self.shapes[name],
            found.entropy_bits,
            codelength,
            found.stable_rank,
            float(found.singular_values[0]),
            *lost,
        ]

    def metrics(self) -> dict[str, float]:
        """Over all matrices: mean entropy by weight, codelength, mean stable rank."""
        weights = {name: outputs * inputs for name, (outputs, inputs) in self.shapes.items()}
        total = sum(weights.values())
        return {
            "entropy_bits": sum(weights[n] * s.entropy_bits for n, s in self.spectra.items()) / total,
            "codelength_bytes": sum(s.codelength_bits for s in self.spectra.values()) / 8,
            "stable_rank": sum(s.stable_rank for s in self.spectra.values()) / len(self.spectra),
        }

    def active_entropies(self, counts: Mapping[int, Tensor]) -> dict[int, float]:
        """Bits a weight of the expert that a token meets (E.4), by layer.

        Args:
            counts: how often each expert was chosen (E,), by layer.
        """
        return {
            layer: active_entropy(chosen_E, self._entropy(layer, len(chosen_E)))
            for layer, chosen_E in counts.items()
        }

    def _entropy(self, layer: int, experts: int) -> Tensor:
        """H(theta_r) of each expert of a layer (E,): the mean over its matrices, by their weights."""
        bits, weights = torch.zeros(experts), torch.zeros(experts)
        for name, found in self.spectra.items():
            parts = name.split(".")
            if parts[0] == "blocks" and int(parts[1]) == layer and parts[-1].isdecimal():
                size = self.shapes[name][0] * self.shapes[name][1]
                bits[int(parts[-1])] += size * found.entropy_bits
                weights[int(parts[-1])] += size
        return bits / weights


def kind_of(name: str) -> str:
    """query, key, ..., of a matrix's name; unembedding."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def figure(
    table: TensorTable,
    groups: Sequence[str],
    losses: Mapping[str, Sequence[float]],
    budgets: Sequence[tuple[float, float, float]],
) -> str:
    """As SVG: the singular values of all matrices; the loss increase of each group by width, where it was measured; and
    what budgets cost, where there are any.

    Args:
        losses: of each group in its order, by the width's label.
        budgets: (budget, measured increase, share of the bytes of 16 bits).
    """
    drawn = Figure(figsize=(15, 4.5), layout="constrained")
    spectra, sensitivities, costs = drawn.subplots(1, 3)
    _singular_values(spectra, table)
    for label, values in losses.items():
        sensitivities.plot(groups, [max(value, 1e-6) for value in values], marker=".", label=label)
    if losses:
        sensitivities.set_yscale("log")
        sensitivities.tick_params(axis="x", labelrotation=90, labelsize=5)
        sensitivities.legend(fontsize=6)
    sensitivities.set_title("loss increase of each group alone, nats a token")
    if budgets:
        costs.plot(*zip(*[(b, share) for b, _, share in budgets], strict=True), marker="o", label="budget")
        costs.plot(*zip(*[(m, share) for _, m, share in budgets], strict=True), "x", label="measured")
        costs.set_xscale("log")
        costs.legend()
    costs.set_title("cost over that of 16 bits, by loss increase")
    FigureCanvasSVG(drawn)
    into = io.StringIO()
    drawn.savefig(into, format="svg")
    return into.getvalue()


def _singular_values(axes: object, table: TensorTable) -> None:
    seen: set[str] = set()
    for name, found in table.spectra.items():
        kind, values = kind_of(name), found.singular_values
        colour = f"C{KINDS.index(kind) if kind in KINDS else 9}"
        shares = torch.linspace(0, 1, len(values)).tolist()
        label = None if kind in seen else kind
        axes.plot(shares, (values / values[0]).tolist(), color=colour, linewidth=0.5, label=label)  # type: ignore[attr-defined]
        seen.add(kind)
    axes.set_title("singular values over the largest, by rank")  # type: ignore[attr-defined]
    axes.legend(fontsize=6)  # type: ignore[attr-defined]
