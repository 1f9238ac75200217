"""Stated priors of a fit: how they are written, those of the literature, how far they moved it, and its bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from escala.contract.errors import LawError

if TYPE_CHECKING:
    import numpy as np

    from escala.laws.form import Form
    from escala.laws.powers import Floats
    from escala.laws.solve import Problem

Priors = Mapping[str, tuple[float, float]]
GROUPS = 100  # of replicates that share a draw of the priors' means; more make a bootstrap slow

# Exponents alone: coefficients and L_inf depend on the text and the tokenizer. Means: Besiroglu et al. 2024
# (arXiv:2404.10102), who fit the runs of Hoffmann et al. 2022 (arXiv:2203.15556; 0.34, 0.28) again. They give standard
# errors of 0.02, of one text and recipe; between texts exponents differ more, and the standard deviations cover form
# nd on gemstones, gadre and datablations (alpha 0.20 to 0.35, beta 0.24 to 0.60).
LITERATURE: dict[str, tuple[float, float]] = {"alpha": (0.348, 0.10), "beta": (0.366, 0.15)}
NAMED: dict[str, Mapping[str, tuple[float, float]]] = {"literature": LITERATURE}


def read_priors(stated: Iterable[str], named: str | None = None) -> dict[str, tuple[float, float]]:
    """Priors from NAME=MEAN,SD texts, put over those of a named set. Raises LawError for what is neither."""
    if named is not None and named not in NAMED:
        raise LawError(f"There are no priors '{named}'.", f"Choose one of: {', '.join(NAMED)}.")
    found = dict(NAMED[named]) if named else {}
    given: set[str] = set()
    for text in stated:
        name, equals, numbers = text.partition("=")
        try:
            mean, sd = (float(each) for each in numbers.split(","))
        except ValueError:
            mean = sd = math.nan
        if not (name and equals and math.isfinite(mean) and math.isfinite(sd) and sd > 0):
            raise LawError(f"'{text}' is not NAME=MEAN,SD.", "Say e.g. --prior alpha=0.35,0.1, with SD > 0.")
        if name in given:
            raise LawError(f"There are two priors of {name}.", "Give one.")
        given.add(name)
        found[name] = (mean, sd)
    return found


def shrinkage(
    form: Form, priors: Priors, fitted: Mapping[str, float], alone: Mapping[str, float] | None
) -> tuple[str, ...]:
    """For a law's findings: each prior, and how far it moved its parameter from the fit without priors (`alone`; None:
    the points do not determine one).
    """
    out = []
    for name, (mean, sd) in priors.items():
        stated = f"prior {f'log {name}' if name in form.coefficients else name} ~ {mean:g} +- {sd:g} (stated)"
        if alone is None:
            out.append(f"{stated}: {name} = {fitted[name]:.3g}; without priors the points determine no law")
        else:
            out.append(f"{stated} moved {name} from {alone[name]:.3g} to {fitted[name]:.3g}")
    return tuple(out)


def replicate_fits(
    problem: Problem,
    start_P: Floats,
    weight_BN: Floats,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> Floats:
    """`search.replicate_fits`, each group of replicates under its own draw of the priors' means.

    A prior is one more observation of its parameter, so a bootstrap draws it again as it does the points; with its mean
    held, intervals would be too narrow (Bardsley et al. 2014, arXiv:1405.5508: exact for a linear model with normal
    errors).
    """
    import numpy as np

    from escala.laws import search

    if not problem.prior_weight_P.any():
        return search.replicate_fits(problem, start_P, weight_BN, progress)
    out, done = [], 0
    for rows_BN in np.array_split(weight_BN, min(GROUPS, len(weight_BN))):
        mean_P = problem.prior_mean_P + problem.prior_sd_P * rng.standard_normal(len(start_P))
        out.append(search.replicate_fits(replace(problem, prior_mean_P=mean_P), start_P, rows_BN))
        done += len(rows_BN)
        if progress is not None:
            progress(done, len(weight_BN))
    return np.concatenate(out)
