"""What a token of decoding costs with matrices stored in one way or another (docs/theory E.6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from escala.contract.records import Rates
from escala.schema import MoEConfig
from workloads.model.compression.layers import Compressed
from workloads.model.compression.low_rank import LowRankWeight


@dataclass(frozen=True)
class ServedCost:
    """Of one sequence's decoding, which reads every active weight once a token.

    Args:
        moe: of the model; an expert's matrices count by the share of experts that a token meets.
        rates: the cluster's coefficients; None: not known.
    """

    moe: MoEConfig | None
    rates: Rates | None

    def joules(self, stored: Mapping[str, Compressed]) -> float | None:
        """Arithmetic and memory traffic of a token at the meter, in joules; what a device draws at rest is left out,
        since it is paid for seconds. None where a coefficient is not stated.
        """
        rates = self.rates
        if rates is None or rates.joules_per_byte is None or rates.joules_per_flop is None:
            return None
        total = 0.0
        for name, matrix in stored.items():
            work = rates.joules_per_byte * matrix.nbytes + rates.joules_per_flop * flops(matrix)
            total += self._share(name) * work
        return rates.site_factor * total

    def _share(self, name: str) -> float:
        is_expert = name.rpartition(".")[2].isdecimal()
        return self.moe.chosen / self.moe.experts if self.moe is not None and is_expert else 1.0


def flops(matrix: Compressed) -> int:
    """Of its product with one vector."""
    outputs, inputs = matrix.shape
    if isinstance(matrix, LowRankWeight):
        return 2 * matrix.left_OR.shape[1] * (outputs + inputs)
    return 2 * outputs * inputs
