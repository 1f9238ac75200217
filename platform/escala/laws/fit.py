"""fit_law: from a table of measured runs to a law (docs/theory D.8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pandas as pd

from escala.contract.errors import LawError
from escala.laws.estimate import estimate
from escala.laws.law import Law
from escala.laws.priors import Priors, shrinkage
from escala.laws.solve import Objective


def fit_law(
    points: pd.DataFrame,
    form: str = "nd",
    objective: Objective = Objective(space="log", huber_delta=1e-3),
    bootstrap: int = 1000,
    group: str | None = None,
    fixed: Mapping[str, float] | None = None,
    priors: Priors | None = None,
    size: str = "n_active",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    backtests: bool = True,
) -> Law:
    """Fit a law to measured runs: the global minimum of the sum of Huber losses, with a bootstrap.

    Args:
        points: one row per run or checkpoint: `loss_nats` and the form's inputs; other columns are kept.
        form: a form's name, see `escala.laws.forms`: "nd", "ndt", "moe", ..., "c" (loss against compute).
        objective: residual space and Huber's delta; delta 1e-8 is the L1 limit.
        bootstrap: replicates; fewer than 20 give no intervals, and a law without intervals is not healthy.
        group: column whose values are resampled together (checkpoints of one run are not independent). Copies of a row
            count once; fewer than 8 independent units give no intervals.
        fixed: parameters held at a value of the formula.
        priors: {name: (mean, sd)}, normal on the log of coefficients and L_inf, on exponents as they are.
        size: the N of forms nd and ndt: "n_active", "n_total" or "n_non_embedding".
        seed: of the bootstrap alone; the fit depends on no seed.
        progress: told how many replicates are done, and of how many.
        backtests: False leaves out the rolling backtests of a law with intervals (0.1 to 0.5 s), for loops of many.
            Its intervals then do not know the form's bias beyond the data, and its health does not ask for a past.

    Raises:
        LawError: a missing column, several tokenizers or evaluation sets, no usable point, fewer points than
            free parameters, or a bad setting.
    """
    law = Law(
        **estimate(points, form, objective, bootstrap, group, fixed, priors, size, seed, progress, backtests)
    )
    if not priors:
        return law
    try:
        alone = Law(**estimate(points, form, objective, 0, group, fixed, None, size, seed)).parameters
    except LawError:  # too few points for a fit without priors
        alone = None
    said = shrinkage(law.form, law.settings["priors"], law.parameters, alone)
    return replace(law, findings=(*law.findings, *said))
