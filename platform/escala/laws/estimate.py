"""From a table of measured runs to what a law holds (docs/theory D.8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from escala.contract.errors import LawError
from escala.laws.calibrate import calibrate
from escala.laws.form import Form
from escala.laws.forms import get_form
from escala.laws.frames import plain_frame
from escala.laws.health import Evidence, problems, remarks
from escala.laws.inputs import SIZES
from escala.laws.intervals import (
    FEWEST_HEALTHY,
    FEWEST_REPLICATES,
    SMALLEST_SHARE,
    bootstrap_weights,
    residual_draws,
)
from escala.laws.powers import (
    Floats,
    loss_and_jacobian,
    losses,
    make_features,
    to_natural,
)
from escala.laws.priors import Priors, replicate_fits
from escala.laws.rolling import Rolling
from escala.laws.rolling import problems as past_problems
from escala.laws.sample import Sample, by_curve
from escala.laws.search import best_fit
from escala.laws.solve import Objective, Problem, huber, residuals
from escala.laws.table import Table, read_points
from escala.laws.units import contradictions

MOST_REPLICATES = 100_000  # beyond, memory and law.json grow, the intervals do not change


def estimate(
    points: pd.DataFrame,
    form: str,
    objective: Objective,
    bootstrap: int,
    group: str | None,
    fixed: Mapping[str, float] | None,
    priors: Priors | None,
    size: str,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    backtests: bool = True,
) -> dict[str, Any]:
    """The fields of a `Law`, by name. Arguments and errors as `fit.fit_law`."""
    chosen = get_form(form)
    fixed, priors = dict(fixed or {}), {k: (float(m), float(s)) for k, (m, s) in (priors or {}).items()}
    _check_settings(chosen, fixed, priors, bootstrap, seed)
    table = read_points(points, chosen, size, group)
    problem = _problem(chosen, table, objective, fixed, priors)
    free = int((problem.low_P < problem.high_P).sum())
    if table.sample.rows < free and not priors:
        raise LawError(
            f"{table.sample.rows} points cannot determine {free} parameters of form {form}.",
            "Measure more runs, or fit a form of fewer parameters, e.g. c. (In Python: fit_law(fixed=, priors=).)",
        )
    problem = _scale_priors(problem)
    theta_P, _ = best_fit(problem)
    residual_N = residuals(problem, losses(chosen, theta_P[None], problem.features))[0]
    sample = by_curve(table.sample, table.columns, residual_N)
    rng = np.random.default_rng(seed)
    replicates_BP, missing = _replicates(problem, theta_P, sample, bootstrap, rng, progress)
    settings: dict[str, Any] = {
        "bootstrap": bootstrap,
        "group": group,
        "fixed": fixed,
        "priors": priors,
        "seed": seed,
    }
    rolling = _rolling(problem, table, sample, size, len(replicates_BP), seed) if backtests else None
    wrong = (*sample.problems, *missing, *contradictions(table.points), *past_problems(rolling))
    fields = _assemble(
        problem, replace(table, sample=sample), theta_P, replicates_BP, wrong, settings, size, rng
    )
    return {**fields, "rolling": rolling}


def _rolling(
    problem: Problem, table: Table, sample: Sample, size: str, count: int, seed: int
) -> Rolling | None:
    """The law's rolling backtests; None for a law without intervals, which they would not widen."""
    if not count:
        return None
    columns = dict(zip(problem.form.needs(size), table.columns.values(), strict=True))
    return calibrate(problem, columns, table.compute_N, sample.unit_N, count, seed)


def _replicates(
    problem: Problem,
    theta_P: Floats,
    sample: Sample,
    bootstrap: int,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] | None,
) -> tuple[Floats, tuple[str, ...]]:
    """The bootstrap's parameters (B, P), and why there are none where they would not be worth an interval."""
    none = np.empty((0, len(theta_P)))
    if bootstrap < FEWEST_REPLICATES:
        few = f"fitted with --bootstrap {bootstrap}; at least {FEWEST_REPLICATES} are needed, better 1000"
        return none, (f"no intervals: {few if bootstrap else 'fitted without a bootstrap'}",)
    if not sample.resamplable:
        return none, ()  # the sample says so itself
    weight_BN = bootstrap_weights(bootstrap, sample.unit_N, rng)
    replicates_BP = replicate_fits(problem, theta_P, weight_BN, rng, progress)
    finite_B = np.isfinite(replicates_BP).all(axis=1)
    if finite_B.mean() < SMALLEST_SHARE:
        return none, (f"no intervals: {1 - finite_B.mean():.0%} of the bootstrap replicates have no fit",)
    if finite_B.sum() < FEWEST_HEALTHY:
        said = f"few bootstrap replicates ({finite_B.sum()}): the ends of the intervals are left to chance; use 1000"
        return replicates_BP[finite_B], (said,)
    return replicates_BP[finite_B], ()


def _check_settings(
    form: Form, fixed: Mapping[str, float], priors: Priors, bootstrap: int, seed: int
) -> None:
    for name in (*fixed, *priors):
        if name not in form.names:
            raise LawError(
                f"Form {form.name} has no parameter '{name}'.", f"It has: {', '.join(form.names)}."
            )
    both = sorted(set(fixed) & set(priors))
    if both:
        raise LawError(f"{', '.join(both)} cannot be both fixed and have a prior.", "Choose one.")
    low, high = form.bounds()
    for name, value in fixed.items():
        i = form.names.index(name)
        if not (math.isfinite(value) and low[i] <= value <= high[i]):
            raise LawError(f"{name} cannot be fixed at {value}.", f"Its range is {low[i]:g} to {high[i]:g}.")
    for name, (mean, sd) in priors.items():
        if not (math.isfinite(mean) and math.isfinite(sd) and sd > 0):
            raise LawError(f"The prior of {name} is ({mean}, {sd}).", "Give (mean, sd) with sd > 0.")
    if not 0 <= bootstrap <= MOST_REPLICATES:
        raise LawError(
            f"bootstrap cannot be {bootstrap}.", f"Use 1000, or 0 for none, and at most {MOST_REPLICATES:,}."
        )
    if seed < 0:
        raise LawError(f"seed cannot be {seed}.", "Use 0, or any whole number above.")


def _problem(
    form: Form, table: Table, objective: Objective, fixed: Mapping[str, float], priors: Priors
) -> Problem:
    """The centred problem. A term whose coefficient is fixed or has a prior keeps its units: it means x =
    1.
    """
    held = {**fixed, **priors}
    features = make_features(form, table.columns, tuple(term.coefficient not in held for term in form.terms))
    low, high = (np.array(ends) for ends in form.bounds())
    mean, weight, spread = (np.zeros(len(form.names)) for _ in range(3))
    for name, value in fixed.items():
        low[form.names.index(name)] = high[form.names.index(name)] = value
    for name, (center, sd) in priors.items():
        mean[form.names.index(name)], weight[form.names.index(name)] = center, sd**-2.0
        spread[form.names.index(name)] = sd
    marked = np.array([name in priors and name in form.coefficients for name in form.names])
    low[marked] = 1e-300
    return Problem(form, features, table.loss_N, objective, low, high, marked, mean, weight, spread)


def _scale_priors(problem: Problem) -> Problem:
    """Put the priors on the scale of the Huber sum.

    exp(-rho/scale) is a likelihood when scale = mean of r psi(r): the variance where residuals are inside
    delta, delta times the Laplace scale where they are outside. It comes from the fit without priors.
    """
    if not problem.prior_weight_P.any():
        return problem
    theta_P, _ = best_fit(replace(problem, prior_weight_P=np.zeros_like(problem.prior_weight_P)))
    residual_N = residuals(problem, losses(problem.form, theta_P[None], problem.features))[0]
    delta = problem.objective.huber_delta
    n, free = len(residual_N), int((problem.low_P < problem.high_P).sum())
    scale = float(np.mean(residual_N * np.clip(residual_N, -delta, delta))) * n / max(n - free, 1)
    return replace(problem, prior_weight_P=problem.prior_weight_P * max(scale, 1e-14))


def _assemble(
    problem: Problem,
    table: Table,
    theta_P: Floats,
    replicates_BP: Floats,
    wrong: tuple[str, ...],
    settings: dict[str, Any],
    size: str,
    rng: np.random.Generator,
) -> dict[str, Any]:
    form, features = problem.form, problem.features
    natural_P = to_natural(form, theta_P[None], features)[0]
    natural_BP = to_natural(form, replicates_BP, features)
    if not np.isfinite(natural_P).all():
        raise LawError(
            "The law's coefficients are beyond what a number can hold.", "Check the units of the inputs."
        )
    residual_N = residuals(problem, losses(form, theta_P[None], features))[0]
    free_P = problem.low_P < problem.high_P
    count = len(replicates_BP)
    rows = table.sample.rows
    draws_B = residual_draws(residual_N, count, int(free_P.sum()), rng, rows) if count else np.empty(0)
    evidence = _evidence(problem, table, theta_P, natural_P, natural_BP, size)
    found = (*wrong, *problems(evidence))
    return {
        "form_name": form.name,
        "size": size,
        "objective": problem.objective,
        "parameters": dict(zip(form.names, natural_P.tolist(), strict=True)),
        "objective_value": float(huber(residual_N, problem.objective.huber_delta).sum()),
        "findings": (*found, *remarks(evidence), *table.notes, *_notes(settings)),
        "healthy": not found,
        "ranges": _ranges(table, form, size),
        "replicates_BP": natural_BP,
        "residual_draws_B": draws_B,
        "residual_N": residual_N,
        "settings": settings,
        "table": plain_frame(table.points),
        "refused_table": plain_frame(table.refused),
    }


def _evidence(
    problem: Problem, table: Table, theta_P: Floats, natural_P: Floats, natural_BP: Floats, size: str
) -> Evidence:
    form, features = problem.form, problem.features
    loss_BN, jacobian_BPN = loss_and_jacobian(form, theta_P[None], features)
    k = len(form.coefficients)
    scale_P = np.concatenate([theta_P[:k], np.ones(len(theta_P) - k)])
    used = {
        *table.columns,
        size,
        "loss_nats",
        "compute_flops",
        "energy_joules",
        "step",
        "seed",
        *_inputs_of(table),
    }
    unused = {
        str(name): table.points[name].to_numpy(np.float64)
        for name in table.points.columns
        if name not in used and table.points[name].dtype.kind in "if" and table.points[name].notna().all()
    }
    log_residual_N = np.log(table.loss_N) - np.log(loss_BN[0])
    return Evidence(
        form,
        table.columns,
        table.loss_N,
        log_residual_N,
        jacobian_BPN[0] * scale_P[:, None] / loss_BN[0],
        natural_P,
        natural_BP,
        problem.low_P < problem.high_P,
        problem.prior_weight_P > 0,
        unused,
        table.sample.rows,
    )


def _inputs_of(table: Table) -> set[str]:
    """Columns that say the same as an input (another count of N): no evidence of a regime."""
    return {name for name in SIZES if name in table.points}


def _notes(settings: Mapping[str, Any]) -> list[str]:
    notes = []
    if settings["fixed"]:
        notes.append(f"held fixed: {', '.join(settings['fixed'])}")
    return notes


def _ranges(table: Table, form: Form, size: str) -> dict[str, tuple[float, float]]:
    names = form.needs(size)
    out = {k: (float(v.min()), float(v.max())) for k, v in zip(names, table.columns.values(), strict=True)}
    if table.compute_N is not None:
        out["compute_flops"] = (float(table.compute_N.min()), float(table.compute_N.max()))
    return out
