"""Sealed forecasts: made, listed, verified, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from escala.client.home import Home
from escala.report import Report, silent
from escala.views.forecasts import ChainView, ForecastsView, ForecastView

if TYPE_CHECKING:
    from escala.laws.forecasts import Forecast


class ForecastMethods(Home):
    """See the module."""

    def seal_point(self, law: str, at: Mapping[str, float], report: Report = silent) -> ForecastView:
        """Seal what a law says of a point, `at` input -> value: the first run there that starts afterwards scores it.

        Raises LawError, NotFoundError, ClusterError where MLflow, which keeps the chain's head, is away.
        """
        from escala.laws import forecasts, queries

        found = queries.predict_law(self.settings, law, at)
        made = forecasts.forecast(found.law, {**at, **found.asked}, "a point")
        return ForecastView.of_forecast(forecasts.seal_now(self.settings, [made], report)[0])

    def seal_plan(
        self,
        law: str,
        n_active: float,
        n_total: float,
        tokens: float,
        report: Report = silent,
        context_tokens: float | None = None,
    ) -> ForecastView:
        """Seal what a law says of the run that a plan asks for, configured like the law's runs; nothing is queued.

        Raises as `seal_point`, and SpecError for a law that does not know how its runs were configured.
        """
        from escala.planning import submission

        return ForecastView.of_forecast(
            submission.seal_plan(self.settings, law, n_active, n_total, tokens, report, context_tokens)
        )

    def forecasts(self, law: str | None = None) -> ForecastsView:
        """Every sealed forecast of this home (of `law`: a name, or NAME@VERSION), oldest first, and how they fared."""
        return ForecastsView.of_forecasts(self._forecasts(law))

    def forecast(self, forecast: str) -> ForecastView:
        """One forecast, by the start of its id. Raises NotFoundError."""
        from escala.laws.forecasts import Chain

        return ForecastView.of_forecast(Chain(self.settings.home).find(forecast))

    def verify_forecasts(self) -> ChainView:
        """Recompute the chain, and compare it with the head in MLflow. Raises ClusterError where that is away."""
        from escala.laws import forecasts

        chain = forecasts.Chain(self.settings.home)
        head, others = forecasts.read_heads(
            self.settings.tracker, forecasts.experiment_of(self.settings), chain
        )
        entries = chain.read()
        return ChainView(
            entries=len(entries),
            forecasts=sum(entry.kind == "forecast" for entry in entries),
            head=entries[-1].hash if entries else None,
            kept=0 if head is None else head.number,
            problems=tuple(forecasts.problems(entries, head, others)),
        )

    def plot_forecasts(self, file: str | Path, law: str | None = None) -> Path:
        """Draw predicted against obtained, and the coverage by factor, as a PNG. Raises NotFoundError for no score."""
        from escala.laws.forecast_plots import plot_forecasts

        return plot_forecasts(self._forecasts(law), Path(file))

    def _forecasts(self, law: str | None) -> list[Forecast]:
        from escala.laws.forecasts import Chain

        found = Chain(self.settings.home).forecasts()
        return [f for f in found if law is None or law in (f.sealed.law, f.sealed.law.partition("@")[0])]
