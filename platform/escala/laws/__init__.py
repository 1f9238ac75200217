"""Scaling laws: `fit_law(points)` -> `Law`. Names load on first use, so a query on law.json imports neither
pandas nor scipy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from escala.laws.backtest import Backtest
    from escala.laws.diagnostics import isoflop_parabolas, slices
    from escala.laws.fit import fit_law
    from escala.laws.intervals import Prediction
    from escala.laws.law import Allocation, Law
    from escala.laws.registry import load_law
    from escala.laws.solve import Objective

_HOME = {
    "Allocation": "law",
    "Backtest": "backtest",
    "Law": "law",
    "Objective": "solve",
    "Prediction": "intervals",
    "fit_law": "fit",
    "isoflop_parabolas": "diagnostics",
    "load_law": "registry",
    "slices": "diagnostics",
}

__all__ = [
    "Allocation",
    "Backtest",
    "Law",
    "Objective",
    "Prediction",
    "fit_law",
    "isoflop_parabolas",
    "load_law",
    "slices",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'escala.laws' has no attribute '{name}'")
    return getattr(import_module(f"escala.laws.{_HOME[name]}"), name)
