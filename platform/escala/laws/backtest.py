"""Cross-validation across scales: does the law foresee runs larger than any that it saw (docs/theory D.8)?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from escala.contract.errors import LawError
from escala.laws.estimate import estimate
from escala.laws.form import Form
from escala.laws.inputs import TOKENS
from escala.laws.intervals import Prediction
from escala.laws.powers import Floats
from escala.laws.solve import Objective
from escala.laws.table import Table, read_points

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Backtest:
    """Mean absolute relative errors on the held-out largest points, and how often they fell inside the
    interval.
    """

    train_points: int
    test_points: int
    error: float  # of the law
    last_known_error: float  # baseline: the loss of the largest training run
    log_linear_error: float  # baseline: log loss linear in log compute
    bias: float  # mean signed relative error of the law
    covered: float  # share of held-out losses inside the 90 % predictive interval
    largest_factor: float  # largest compute held out over the largest in training

    @property
    def ratio(self) -> float:
        """The law's error over the better baseline's."""
        best = min(self.last_known_error, self.log_linear_error)
        return self.error / best if best > 0 else math.inf


class FittedLaw(Protocol):
    """What of a `Law`, which stands above this module, a backtest reads; its class makes one of `estimate`'s fields."""

    @property
    def form(self) -> Form: ...
    @property
    def form_name(self) -> str: ...
    @property
    def size(self) -> str: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def replicates_BP(self) -> Floats: ...
    @property
    def points(self) -> pd.DataFrame: ...
    def curve(self, columns: Mapping[str, Floats]) -> Floats: ...
    def predict(self, level: float = 0.9, **point: float) -> Prediction: ...


def backtest(law: FittedLaw, share: float = 0.1) -> Backtest:
    """Hold out the largest `share` of points by compute, fit the rest, and compare with two baselines.

    Compute is 6 N D; of a form without N and D it is the table's compute_flops. Raises LawError where it is not known.
    """
    settings = law.settings
    points = law.points
    table = read_points(points, law.form, law.size, settings["group"])
    compute_N = _compute(law, table)
    if compute_N is None:
        raise LawError("The points do not say their compute.", "Give tokens and a size, or compute_flops.")
    order = np.argsort(compute_N, kind="stable")
    held = max(1, math.ceil(share * len(order)))
    train, test = order[:-held], order[-held:]
    refit: FittedLaw = type(law)(
        **estimate(
            points.iloc[train],
            form=law.form_name,
            objective=law.objective,
            bootstrap=min(settings["bootstrap"], 300),
            group=settings["group"],
            fixed=settings["fixed"],
            priors=settings["priors"],
            size=law.size,
            seed=settings["seed"],
        )
    )
    inputs = {name: values[test] for name, values in zip(law.inputs, table.columns.values(), strict=True)}
    actual = table.loss_N[test]
    predicted = refit.curve(inputs)
    log_c, log_l = np.log(compute_N[train]), np.log(table.loss_N[train])
    slope, level = np.polyfit(log_c - log_c.mean(), log_l, 1)
    linear = np.exp(level + slope * (np.log(compute_N[test]) - log_c.mean()))
    return Backtest(
        len(train),
        len(test),
        _error(predicted, actual),
        _error(np.full(len(test), table.loss_N[train[-1]]), actual),
        _error(linear, actual),
        float(np.mean(predicted / actual - 1)),
        _covered(refit, inputs, actual),
        float(compute_N[test].max() / compute_N[train].max()),
    )


def _error(predicted: Floats, actual: Floats) -> float:
    return float(np.mean(np.abs(predicted / actual - 1)))


def _covered(law: FittedLaw, inputs: dict[str, Floats], actual_N: Floats) -> float:
    """Share of the losses inside the law's 90 % predictive interval; NaN without a bootstrap."""
    if not len(law.replicates_BP):
        return math.nan
    inside = []
    for i, actual in enumerate(actual_N):
        answer = law.predict(0.9, **{name: float(values[i]) for name, values in inputs.items()})
        inside.append(answer.low_nats is not None and answer.low_nats <= actual <= (answer.high_nats or 0.0))
    return float(np.mean(inside))


def _compute(law: FittedLaw, table: Table) -> Floats | None:
    size = law.form.size_input(law.size)
    if size is None or law.form.token_term is None:
        return table.compute_N
    size_N, tokens_N = (table.points[name].to_numpy(np.float64) for name in (size, TOKENS.name))
    product: Floats = 6.0 * size_N * tokens_N
    return product
