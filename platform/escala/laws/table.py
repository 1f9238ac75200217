"""From a table to arrays: which points are used, which are refused and why. Pandas stays in this file and in
law.py's edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from escala.contract.errors import LawError
from escala.laws import cells
from escala.laws.files import ATTENTION, REFUSAL, quantities
from escala.laws.form import Form
from escala.laws.inputs import SIZES
from escala.laws.powers import Floats
from escala.laws.sample import Sample, effective_sample

FINGERPRINTS = ("tokenizer_fingerprint", "evaluation_fingerprint")
KAPPA = 6.0  # FLOPs per parameter and token (docs/theory D.2), where a table has no compute_flops


@dataclass(frozen=True)
class Table:
    """The usable points, the refused ones (with a `reason` column), what is resampled together, and notes for the law's
    findings.
    """

    points: pd.DataFrame
    refused: pd.DataFrame
    columns: dict[str, Floats]
    loss_N: Floats
    compute_N: Floats | None
    sample: Sample
    notes: tuple[str, ...]


def read_points(points: pd.DataFrame, form: Form, size: str, group: str | None) -> Table:
    """Check `points` for `form`; a row with a missing, non-finite or non-positive number is refused with its
    reason. So is a row that states one itself, in the column `escala_refusal`.

    Raises LawError for missing or doubled columns and for points that do not belong in one law: several tokenizers or
    evaluation sets, since their losses cannot be compared (docs/theory D.1).
    """
    if size not in SIZES:
        raise LawError(f"size cannot be '{size}'.", f"Choose one of: {', '.join(SIZES)}.")
    if not isinstance(points, pd.DataFrame):
        raise LawError(
            f"Points are a pandas DataFrame, not a {type(points).__name__}.", "pd.DataFrame(rows) makes one."
        )
    doubled = sorted({str(name) for name in points.columns[points.columns.duplicated()]})
    if doubled:
        raise LawError(
            f"The table has two columns called {', '.join(doubled)}.", "Rename or remove all but one of them."
        )
    frame, notes = _with_derived(points, form)
    missing = [name for name in ["loss_nats", *form.needs(size)] if name not in frame]
    if group is not None and group not in frame:
        missing.append(group)
    if missing:
        raise LawError(
            f"The table lacks {', '.join(missing)}; form {form.name} needs them.",
            f"Rename columns to match (it has: {', '.join(map(str, points.columns))}).",
        )
    reasons = _reasons(frame, form, size, group)
    bad = reasons != ""
    if REFUSAL in frame and "reason" in frame and frame.loc[~bad, "reason"].isna().all():
        frame = frame.drop(columns="reason")  # of a sweep's table: the same in words for people
    frame = frame.drop(columns=REFUSAL, errors="ignore")
    used = frame[~bad] if bad.any() else frame
    _refuse_mixtures(used)
    refused = frame[bad].rename(columns={"reason": "table_reason"}).assign(reason=reasons[bad])
    if len(refused):
        notes = (*notes, f"{len(refused)} of {len(frame)} points were refused; each keeps its reason.")
    if not len(used):
        raise LawError(
            f"No usable point among {len(frame)} rows: {_told(refused)}.",
            "Correct the rows, or name their columns with --map.",
        )
    columns = {
        name: floats(used[column]) for name, column in zip(form.columns, form.needs(size), strict=True)
    }
    loss_N = floats(used["loss_nats"])
    sample = effective_sample(used, columns, loss_N, group)
    notes = (*notes, *sample.notes)
    return Table(_plain_types(used), refused, columns, loss_N, _compute(used), sample, notes)


def _told(refused: pd.DataFrame) -> str:
    """Why rows were refused, the commonest reason first, with the first row of each."""
    if not len(refused):
        return "the table is empty"
    found = refused["reason"].value_counts(sort=True)
    rows = {reason: refused.index[refused["reason"] == reason][0] for reason in found.index}
    said = [
        f"{reason} (row {rows[reason]}" + (f" and {count - 1} more)" if count > 1 else ")")
        for reason, count in found.items()
    ]
    return "; ".join(said[:3]) + (f"; and {len(said) - 3} other reasons" if len(said) > 3 else "")


def floats(series: pd.Series) -> Floats:
    """Numbers; NaN for what is none (a word, a boolean, a date)."""
    if series.dtype.kind in "iuf":
        return np.asarray(series.to_numpy(dtype=np.float64, na_value=np.nan))
    if series.dtype.kind != "O":
        return np.full(len(series), np.nan)
    found = (cells.to_float(value) for value in series.tolist())
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)


def _plain_types(used: pd.DataFrame) -> pd.DataFrame:
    """The usable rows with numbers as numbers: a column that a refused row's word made one of texts, too."""
    changed = {}
    for name in (name for name in quantities() if name in used and used[name].dtype.kind == "O"):
        values_N = floats(used[name])
        if not np.isnan(values_N).any():
            changed[name] = values_N
    return used.assign(**changed) if changed else used


def _with_derived(points: pd.DataFrame, form: Form) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The table with what the form derives from other columns where it lacks it, and a note that says so."""
    notes: tuple[str, ...] = ()
    for each in form.derived:
        if each.input.name not in points and set(each.sources) <= set(points.columns):
            known = {name: floats(points[name]) for name in each.sources}
            points, notes = points.assign(**{each.input.name: each.compute(known)}), (*notes, each.note)
    return points, notes


def _compute(used: pd.DataFrame) -> Floats | None:
    """FLOPs of each point where the table can tell them (for extrapolation and cross-validation)."""
    if "compute_flops" in used:
        compute = floats(used["compute_flops"])
        if np.isfinite(compute).all() and (compute > 0).all():
            return compute
    for size in SIZES:
        if size in used and "tokens" in used:
            with np.errstate(over="ignore"):  # beyond what a number can hold: infinite, so not known
                compute = KAPPA * floats(used[size]) * floats(used["tokens"])
            return compute if np.isfinite(compute).all() and (compute > 0).all() else None
    return None


def _reasons(frame: pd.DataFrame, form: Form, size: str, group: str | None) -> np.ndarray:
    """Why each row cannot be used; empty where it can. The first reason found stands."""
    stated = frame[REFUSAL] if REFUSAL in frame else pd.Series(None, index=frame.index, dtype=object)
    texts = ["" if cells.is_missing(value) else str(value) for value in stated.tolist()]
    reasons_N = np.array(texts, dtype=object)  # refused by whoever made the table

    def refuse(bad_N: np.ndarray, reason: str) -> None:
        reasons_N[bad_N & (reasons_N == "")] = reason

    for name in ["loss_nats", *form.needs(size)]:
        values_N = floats(frame[name])
        for i in np.flatnonzero(np.isnan(values_N) & (reasons_N == "")):
            value = frame[name].iloc[i]
            said = "missing or" if cells.is_missing(value) else f"'{value}',"
            reasons_N[i] = f"{name} is {said} not a number"
        refuse(np.isinf(values_N), f"{name} is infinite")
        refuse(values_N <= 0, f"{name} is not positive")
    if form.mix is not None:
        most, least = form.mix.over.name, form.terms[0].column
        refuse(floats(frame[most]) < floats(frame[least]) * (1 - 1e-9), f"{most} is less than {least}")
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
    attention = sorted(set(used[ATTENTION].dropna().astype(str))) if ATTENTION in used else []
    if len(attention) > 1:
        raise LawError(
            f"The points have {len(attention)} kinds of attention ({'; '.join(attention)}): one law has one, "
            "whose cost its plans count.",
            "Fit each alone: a sweep with one model.attention, or --points with one kind's rows. "
            "`escala laws plan LAW --attention KIND` compares kinds.",
        )
