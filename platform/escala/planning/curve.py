"""A smooth curve through knots in logarithms: what has no formula in T, as the solver of plans needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from escala.laws.powers import Floats


@dataclass(frozen=True)
class Curve:
    """log y over log x by cubic Hermite interpolation, its slope with it; beyond the ends straight lines."""

    log_x: tuple[float, ...]  # rising, at least two
    log_y: tuple[float, ...]
    slopes: tuple[float, ...]  # d log y / d log x

    @classmethod
    def through(cls, x: Sequence[float], y: Sequence[float]) -> Curve:
        """Through positive (x, y), x rising; slopes at the knots by second-order differences."""
        log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
        slopes = np.gradient(log_y, log_x, edge_order=2 if len(log_x) > 2 else 1)
        return cls(*(tuple(values.tolist()) for values in (log_x, log_y, slopes)))

    @cached_property
    def _knots(self) -> tuple[Floats, Floats, Floats]:
        return np.array(self.log_x), np.array(self.log_y), np.array(self.slopes)

    def at(self, log_x_B: Floats) -> tuple[Floats, Floats]:
        """(log y, its slope), (B,) each."""
        x_K, y_K, slope_K = self._knots
        inside_B = np.clip(log_x_B, x_K[0], x_K[-1])
        k = np.clip(np.searchsorted(x_K, inside_B, side="right") - 1, 0, len(x_K) - 2)
        step, rise = x_K[k + 1] - x_K[k], y_K[k + 1] - y_K[k]
        u = (inside_B - x_K[k]) / step
        first, last = slope_K[k] * step - rise, rise - slope_K[k + 1] * step
        bend = (1.0 - u) * first + u * last
        value_B = y_K[k] + u * rise + u * (1.0 - u) * bend
        slope_B = (rise + (1.0 - 2.0 * u) * bend + u * (1.0 - u) * (last - first)) / step
        return value_B + slope_B * (log_x_B - inside_B), slope_B
