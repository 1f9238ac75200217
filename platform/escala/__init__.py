"""escala: LLM experiments on a Ray cluster, turned into scaling laws that decide the next experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from escala.client import Escala
    from escala.laws import fit_law, load_law

__all__ = ["Escala", "fit_law", "load_law"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `escala --help` costs nothing."""
    if name == "Escala":
        from escala.client import Escala

        return Escala
    if name in ("fit_law", "load_law"):
        from escala import laws

        return getattr(laws, name)
    raise AttributeError(f"module 'escala' has no attribute {name!r}")
