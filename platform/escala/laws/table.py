"""From a table to arrays: which points are used, which are refused and why. Pandas stays in this file and in
law.py's edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from escala.errors import LawError
from escala.laws.forms import Floats, Form

SIZES = ("n_active", "n_total", "n_non_embedding")
FINGERPRINTS = ("tokenizer_fingerprint", "evaluation_fingerprint")
KAPPA = 6.0  # FLOPs per parameter and token (SPEC.md D.2), where a table has no compute_flops


@dataclass(frozen=True)
class Table:
    """The usable points, the refused ones (with a `reason` column), and notes for the law's findings."""

    points: pd.DataFrame
    refused: pd.DataFrame
    columns: dict[str, Floats]
    loss_N: Floats
    compute_N: Floats | None
    group_N: np.ndarray | None
    notes: tuple[str, ...]


def _needed(form: Form, size: str) -> list[str]:
    return [size if name == "size" else name for name in form.columns]


def read_points(points: pd.DataFrame, form: Form, size: str, group: str | None) -> Table:
    """Check `points` for `form`; a row with a missing, non-finite or non-positive number is refused with its
    reason.

    Raises LawError for missing columns and for points that do not belong in one law: several tokenizers or
    evaluation sets, since their losses cannot be compared (SPEC.md D.1).
    """
    if size not in SIZES:
        raise LawError(f"size cannot be '{size}'.", f"Choose one of: {', '.join(SIZES)}.")
    if not isinstance(points, pd.DataFrame):
        raise LawError(
            f"Points are a pandas DataFrame, not a {type(points).__name__}.", "pd.DataFrame(rows) makes one."
        )
    frame, notes = _with_compute(points, form)
    missing = [name for name in ["loss_nats", *_needed(form, size)] if name not in frame]
    if group is not None and group not in frame:
        missing.append(group)
    if missing:
        raise LawError(
            f"The table lacks {', '.join(missing)}; form {form.name} needs them.",
            f"Rename columns to match (it has: {', '.join(map(str, points.columns))}).",
        )
    reasons = _reasons(frame, form, size, group)
    bad = reasons != ""
    used = (frame[~bad] if bad.any() else frame).drop(columns="reason", errors="ignore")
    _refuse_mixtures(used)
    refused = frame[bad].assign(reason=reasons[bad])
    if len(refused):
        notes = (*notes, f"{len(refused)} of {len(frame)} points were refused; each keeps its reason.")
    if not len(used):
        raise LawError(
            f"No usable point: {reasons[0] if len(reasons) else 'the table is empty'}.", "See .refused."
        )
    columns = {name: _floats(used[size if name == "size" else name]) for name in form.columns}
    groups = None if group is None else np.asarray(pd.factorize(used[group])[0])
    return Table(used, refused, columns, _floats(used["loss_nats"]), _compute(used), groups, notes)


def _floats(series: pd.Series) -> Floats:
    return np.asarray(pd.to_numeric(series, errors="coerce"), dtype=np.float64)


def _with_compute(points: pd.DataFrame, form: Form) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Form c needs compute_flops; a table that has none gets 6 N_active D, and a note says so."""
    if form.name != "c" or "compute_flops" in points or not {"n_active", "tokens"} <= set(points.columns):
        return points, ()
    derived = KAPPA * _floats(points["n_active"]) * _floats(points["tokens"])
    return points.assign(compute_flops=derived), ("The table has no compute_flops: 6 N_active D was used.",)


def _compute(used: pd.DataFrame) -> Floats | None:
    """FLOPs of each point where the table can tell them (for extrapolation and cross-validation)."""
    if "compute_flops" in used:
        compute = _floats(used["compute_flops"])
        if np.isfinite(compute).all() and (compute > 0).all():
            return compute
    for size in SIZES:
        if size in used and "tokens" in used:
            compute = KAPPA * _floats(used[size]) * _floats(used["tokens"])
            return compute if np.isfinite(compute).all() and (compute > 0).all() else None
    return None


def _reasons(frame: pd.DataFrame, form: Form, size: str, group: str | None) -> np.ndarray:
    """Why each row cannot be used; empty where it can. The first reason found stands."""
    stated = frame["reason"] if "reason" in frame else pd.Series(None, index=frame.index, dtype=object)
    reasons_N = stated.fillna("").astype(object).to_numpy(copy=True)  # refused by whoever made the table

    def refuse(bad_N: np.ndarray, reason: str) -> None:
        reasons_N[bad_N & (reasons_N == "")] = reason

    for name in ["loss_nats", *_needed(form, size)]:
        values_N = _floats(frame[name])
        refuse(np.isnan(values_N), f"{name} is missing or not a number")
        refuse(np.isinf(values_N), f"{name} is infinite")
        refuse(values_N <= 0, f"{name} is not positive")
    if form.mixed:
        refuse(
            _floats(frame["n_total"]) < _floats(frame["n_active"]) * (1 - 1e-9),
            "n_total is less than n_active",
        )
    if group is not None:
        refuse(np.asarray(frame[group].isna()), f"{group} is missing")
    return reasons_N


def _refuse_mixtures(used: pd.DataFrame) -> None:
    for name in FINGERPRINTS:
        if name not in used:
            continue
        kinds = used[name].astype(object).where(used[name].notna(), None).unique()
        if len(kinds) > 1:
            raise LawError(
                f"The points have {len(kinds)} different values of {name}: their losses cannot be compared.",
                "Fit each alone, or evaluate all on the same documents with the same tokenizer.",
            )
