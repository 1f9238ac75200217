"""escala: LLM experiments on a Ray cluster, turned into scaling laws that decide the next experiment."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {  # name -> where it is, and what it is called there
    "fit_law": ("escala.laws", "fit_law"),
    "load_law": ("escala.laws", "load_law"),
    "plan": ("escala.planning.plans", "plan_law"),
    "propose": ("escala.planning.plans", "propose_runs"),
    "runs": ("escala.api", "runs"),
    "submit": ("escala.api", "submit"),
}
__all__ = ["fit_law", "load_law", "plan", "propose", "runs", "submit"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `escala --help` costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'escala' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)
