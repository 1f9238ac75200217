"""What a law knows of its runs: their configuration, and their context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from escala.laws.reference import Stored

RECIPE_DECIDES = {  # what follows from N and D by recipe, and so is not taken from a law's runs
    "model": ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "head_dim"),
    "training": ("steps", "train_tokens", "batch_sequences", "micro_batch_sequences", "seed"),
    "optimizer": ("learning_rate",),
}
NEVER_KEPT = {  # N and D decide these alone, and each run has its own seed
    "model.n_layers",
    "model.d_model",
    "training.steps",
    "training.train_tokens",
    "training.seed",
}


def base_of(stored: Stored) -> dict[str, Any]:
    """The configuration that the law's runs share, less what the recipe decided: what a run that is to be compared
    with them has. What the space of their sweep states no recipe decided, so it is kept. Empty for a law of a table
    that says nothing of its runs.
    """
    kept = set(stored.provenance.get("stated") or ()) - NEVER_KEPT
    return _comparable(stored.provenance.get("configuration") or {}, "", "", kept)


def _comparable(section: Mapping[str, Any], name: str, path: str, kept: set[str]) -> dict[str, Any]:
    base = dict[str, Any]()
    for key, value in section.items():
        if isinstance(value, Mapping):
            inner = _comparable(value, key, f"{path}{key}.", kept)
            base |= {key: inner} if inner else {}
        elif key in RECIPE_DECIDES.get(name, ()) and f"{path}{key}" not in kept:
            continue
        elif value is not None or name == "moe":  # of experts None says something: nothing is dropped
            base[key] = value
    return base


def context_of(stored: Stored) -> float | None:
    """The context of the law's runs, where they all have one."""
    configuration = stored.provenance.get("configuration") or {}
    tokens = configuration.get("training", {}).get("context_tokens")
    tokens = configuration.get("model", {}).get("max_context_tokens") if tokens is None else tokens
    return None if tokens is None else float(tokens)


def has_context(stored: Stored) -> bool:
    """Whether T is an input of the law."""
    return "context_tokens" in stored.law.form.columns


def document_tokens(stored: Stored) -> float | None:
    """How long the documents of the law's runs are, where their corpora state it; the shortest."""
    corpora = ((stored.provenance.get("configuration") or {}).get("data") or {}).get("corpora") or []
    stated = [float(each.get("document_tokens") or 0) for each in corpora if isinstance(each, Mapping)]
    return min(stated, default=0.0) or None


def measured_contexts(stored: Stored) -> list[float]:
    """Those of the law's runs, for a law of T; else none."""
    if not has_context(stored):
        return []
    return sorted(set(map(float, stored.law.points["context_tokens"])))
