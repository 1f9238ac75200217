"""A law that answers: parameters with intervals, predictions, the best split of a budget, and what is wrong
with it.

Nothing here imports pandas or scipy until a table is asked for, so a query on a cached law.json is quick.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from escala.contract.errors import LawError
from escala.laws.form import Form
from escala.laws.forms import get_form, known_inputs
from escala.laws.frames import frame
from escala.laws.intervals import FEWEST_REPLICATES, Prediction, check_level, quantile_pair, resolves
from escala.laws.optimum import Optimum
from escala.laws.powers import Floats, losses, plain_features
from escala.laws.rolling import Rolling, distance, extrapolation, trimmed
from escala.laws.solve import Objective

if TYPE_CHECKING:
    import pandas as pd

    from escala.laws.backtest import Backtest

VERSION = 2  # of the JSON
UNCALIBRATED = 1  # without `rolling`, and still read
NOT_CALIBRATED = (
    "not backtested: stored by an escala before 0.3, so its intervals know the noise and the bootstrap alone, not the "
    "form's bias beyond the data; fit the law again"
)


@dataclass(frozen=True)
class Allocation:
    """The best split of a budget. Bounds are the predictive interval of the loss and the percentile interval
    of N, at 90 %.
    """

    n_active: float
    n_total: float
    tokens: float
    loss_nats: float
    low_nats: float | None
    high_nats: float | None
    n_active_low: float | None
    n_active_high: float | None
    compute_flops: float
    context_tokens: float | None
    extrapolation: dict[str, float]
    first_order_residual: float  # relative; 0 at the optimum
    size: str  # the N that the law was fitted on

    @property
    def tokens_per_parameter(self) -> float:
        """D/N_active."""
        return self.tokens / self.n_active


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law. Parameters are those of the formula in nats, parameters, tokens; see `fit_law` for the
    rest.
    """

    form_name: str
    size: str
    objective: Objective
    parameters: dict[str, float]
    objective_value: float  # the SUM of the points' Huber losses, priors apart
    findings: tuple[str, ...]  # plain words
    healthy: bool
    ranges: dict[str, tuple[float, float]]  # smallest and largest value of each input and of compute_flops
    replicates_BP: Floats  # bootstrap parameters, in the order of the form's names
    residual_draws_B: Floats  # one inflated residual per replicate, in the objective's space
    residual_N: Floats
    settings: dict[str, Any]  # bootstrap, group, fixed, priors, seed, as asked
    table: dict[str, Any] = field(repr=False)
    refused_table: dict[str, Any] = field(repr=False)
    rolling: Rolling | None = (
        None  # rolling backtests; None: the intervals know the noise and the bootstrap alone
    )

    @property
    def form(self) -> Form:
        """The functional form."""
        return get_form(self.form_name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that the law reads."""
        return self.form.needs(self.size)

    @property
    def points(self) -> pd.DataFrame:
        """The points that were fitted, all their columns kept."""
        return frame(self.table)

    @property
    def refused(self) -> pd.DataFrame:
        """The points that were not, each with its `reason`; the table's own column of that name: `table_reason`."""
        return frame(self.refused_table)

    @property
    def refusals(self) -> list[tuple[Any, str]]:
        """(row, reason) of each refused point; a file's rows are its lines, counted from 1."""
        reasons: list[str] = next(
            (c["values"] for c in self.refused_table["columns"] if c["name"] == "reason"), []
        )
        return list(zip(self.refused_table["index"], reasons, strict=True))

    @property
    def has_intervals(self) -> bool:
        """Whether the law has a bootstrap; where not, its findings say why."""
        return len(self.replicates_BP) > 0

    def intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap interval of each parameter. Raises LawError for a law that has none."""
        self._check_level(level)
        if not self.has_intervals:
            raise LawError(
                f"This law has no intervals: {self._why_none}.",
                "Fit it with a bootstrap of 1000 (--bootstrap 1000) to more independent runs.",
            )
        names = self.form.names
        return {name: quantile_pair(self.replicates_BP[:, i], level) for i, name in enumerate(names)}

    @property
    def _why_none(self) -> str:
        said = (f.removeprefix("no intervals: ") for f in self.findings if f.startswith("no intervals: "))
        return next(said, "it was fitted without a bootstrap")

    def _check_level(self, level: float) -> None:
        check_level(level)
        count = len(self.replicates_BP)
        if count and not resolves(count, level):
            raise LawError(
                f"{count} bootstrap replicates cannot give an interval of level {level:g}.",
                f"Fit the law with --bootstrap {max(1000, round(10 / (1 - level)))}, or ask a lower level.",
            )

    def predict(self, level: float = 0.9, **point: float) -> Prediction:
        """Loss at a point, e.g. n_active=1e9, tokens=2e10, with the PREDICTIVE interval: uncertainty of fit,
        residual, and beyond the data the bias of the form that the law's own backtests leave likely.

        Raises LawError for an input that is missing, unknown or not positive, and for a level that takes more
        replicates.
        """
        return self._answer(level, point, residual=True)

    def predict_mean(self, level: float = 0.9, **point: float) -> Prediction:
        """As `predict`, with the interval of the MEAN: what a better design can shrink (the residual and
        the form's bias it cannot).
        """
        return self._answer(level, point, residual=False)

    def _answer(self, level: float, point: Mapping[str, float], residual: bool) -> Prediction:
        self._check_level(level)
        columns = self.columns_of(point)
        loss = float(self.curve(columns)[0])
        factors = self._extrapolation(point)
        low, high = None, None
        if len(self.replicates_BP):
            draws_B = self.evaluate(self.replicates_BP, columns)[:, 0]
            if residual:
                draws_B = self._with_errors(draws_B, factors)
            low, high = quantile_pair(draws_B, level)
            if residual:  # the form's own answer is no outlier of its interval
                low, high = min(low, loss), max(high, loss)
        return Prediction(loss, low, high, factors, level)

    def _with_errors(self, mean_B: Floats, factors: Mapping[str, float]) -> Floats:
        """Draws of the mean, each with a residual and, beyond the data, with a draw of the form's bias."""
        rolling = self.rolling
        noise_B = self.residual_draws_B if rolling is None else trimmed(self.residual_draws_B)
        drawn_B = mean_B * np.exp(noise_B) if self.objective.space == "log" else mean_B + noise_B
        if rolling is None:
            return drawn_B
        found: Floats = drawn_B * np.exp(rolling.bias_draws_B * np.sqrt(distance(factors)))
        return found

    def curve(self, columns: Mapping[str, Floats]) -> Floats:
        """The law's loss at arrays of inputs (named as in `predict`), without intervals: for plots and
        searches.
        """
        theta_BP = np.array([[self.parameters[name] for name in self.form.names]])
        loss_N: Floats = self.evaluate(theta_BP, columns)[0]
        return loss_N

    def evaluate(self, theta_BP: Floats, columns: Mapping[str, Floats]) -> Floats:
        """The loss of parameters of the form (B, P) at arrays of inputs (N,): (B, N)."""
        form = self.form
        named = {
            name: columns[column] for name, column in zip(form.columns, form.needs(self.size), strict=True)
        }
        return losses(form, theta_BP, plain_features(form, named))

    def columns_of(self, point: Mapping[str, float]) -> dict[str, Floats]:
        """A point as arrays of one value, of the inputs that the law reads.

        Raises LawError for an input that is missing, unknown or not positive.
        """
        unknown = sorted(set(point) - set(known_inputs()))
        if unknown:
            raise LawError(f"A law knows no input {', '.join(unknown)}.", self._reads())
        given = dict(point)
        for each in self.form.derived:
            if each.input.name not in given and set(each.sources) <= set(given):
                given[each.input.name] = each.compute(given)
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise LawError(f"The law ({self.form.formula}) needs {', '.join(missing)}.", self._reads())
        for name in self.inputs:
            if not (np.isfinite(given[name]) and given[name] > 0):
                raise LawError(f"{name} = {given[name]} must be a positive number.", "Give counts, not logs.")
        return {name: np.array([float(given[name])]) for name in self.inputs}

    def _reads(self) -> str:
        """Which inputs the law reads, with units, and from what it derives one."""
        inputs, form = known_inputs(), self.form
        words = [str(inputs[name]) for name in self.inputs]
        words += [f"or {' and '.join(str(inputs[name]) for name in each.sources)}" for each in form.derived]
        return f"It reads: {', '.join(words)}."

    def _extrapolation(self, point: Mapping[str, float]) -> dict[str, float]:
        """How many times beyond the data, per input and for compute (6 N D where the point does not say
        it).
        """
        known = dict(point)
        if "compute_flops" not in known and "tokens" in known:
            size = known.get("n_active", known.get(self.size))
            if size is not None:
                known["compute_flops"] = 6.0 * size * known["tokens"]
        return {name: float(factor) for name, factor in extrapolation(self.ranges, known).items()}

    def optimum(
        self,
        compute_flops: float,
        *,
        kappa: float = 6.0,
        context_tokens: float | None = None,
        n_total_over_active: float | None = None,
    ) -> Allocation:
        """N and D that minimise the loss at C = kappa N_active D, in closed form (nd; ndt at T; moe at a
        ratio).

        Raises LawError for a form without a split, and where the bound that the form needs is missing.
        """

        def best(theta: Mapping[str, float]) -> Optimum:
            return self.form.optimum(
                theta,
                compute_flops,
                kappa=kappa,
                context_tokens=context_tokens,
                n_total_over_active=n_total_over_active,
            )

        found = best(self.parameters)
        n_total = found.size * (n_total_over_active or 1.0)
        point = {
            "n_active": found.size,
            "n_total": n_total,
            "tokens": found.tokens,
            "compute_flops": compute_flops,
        }
        point[self.size] = found.size
        if context_tokens is not None:
            point["context_tokens"] = context_tokens
        prediction = self.predict(0.9, **point)
        low, high = self._size_interval(best)
        return Allocation(
            found.size,
            n_total,
            found.tokens,
            found.loss_nats,
            prediction.low_nats,
            prediction.high_nats,
            low,
            high,
            compute_flops,
            context_tokens,
            prediction.extrapolation,
            found.residual,
            self.size,
        )

    def _size_interval(
        self, best: Callable[[Mapping[str, float]], Optimum]
    ) -> tuple[float | None, float | None]:
        """90 % interval of the optimal N over the replicates that have an interior optimum."""
        replicates_BP = self.replicates_BP[self.form.interior(self.replicates_BP)]
        sizes = []
        for row in replicates_BP.tolist():
            with suppress(LawError):  # two exponents near 0: an optimum that no number holds
                sizes.append(best(dict(zip(self.form.names, row, strict=True))).size)
        return quantile_pair(np.array(sizes), 0.9) if len(sizes) >= FEWEST_REPLICATES else (None, None)

    def backtest(self, share: float = 0.1) -> Backtest:
        """Hold out the largest `share` of points by compute, fit the rest, and compare with two baselines.

        Raises LawError where the points do not say their compute.
        """
        from escala.laws.backtest import backtest  # pandas and scipy, which a query does without

        return backtest(self, share)

    def to_json(self) -> str:
        """All of the law as JSON; every float64 comes back exactly."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["objective"] = asdict(self.objective)
        plain["version"] = VERSION
        for name in ("replicates_BP", "residual_draws_B", "residual_N"):
            plain[name] = getattr(self, name).tolist()
        plain["rolling"] = None if self.rolling is None else self.rolling.plain()
        return json.dumps(plain, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Law:
        """The law of `to_json`. Raises LawError for anything else."""
        try:
            plain = json.loads(text)
            version = plain.pop("version")
            if version == UNCALIBRATED:
                plain |= {"rolling": None, "findings": [*plain["findings"], NOT_CALIBRATED]}
            elif version != VERSION:
                raise LawError(
                    f"This law.json has format {version}; this escala reads format {VERSION}.",
                    "Use the escala that wrote it, or fit the law again.",
                )
            width = len(get_form(plain["form_name"]).names)
            plain["objective"] = Objective(**plain["objective"])
            plain["replicates_BP"] = np.array(plain["replicates_BP"], dtype=np.float64).reshape(-1, width)
            for name in ("residual_draws_B", "residual_N"):
                plain[name] = np.array(plain[name], dtype=np.float64)
            plain["findings"] = tuple(plain["findings"])
            plain["ranges"] = {name: tuple(pair) for name, pair in plain["ranges"].items()}
            if plain["rolling"] is not None:
                plain["rolling"] = Rolling.of_plain(plain["rolling"])
            return cls(**plain)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LawError(f"This is no law.json: {error!r}.", "Law.to_json writes one.") from error
