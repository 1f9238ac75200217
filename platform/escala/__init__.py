"""escala: LLM experiments on a Ray cluster, turned into scaling laws that decide the next experiment."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "fit_law": "escala.laws",
    "load_law": "escala.laws",
    "runs": "escala.api",
    "submit": "escala.api",
}
__all__ = ["fit_law", "load_law", "runs", "submit"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `escala --help` costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'escala' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
