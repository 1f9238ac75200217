"""Laws: fitted, kept, asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from escala.client.home import Home
from escala.views.laws import (
    CalibrationView,
    FittedLawView,
    LawComparisonView,
    LawPreviewView,
    LawVersionView,
    LawView,
    PredictionView,
)


class LawMethods(Home):
    """See the module."""

    def fit_sweeps(self, names: Sequence[str], law: str, **fit: Any) -> FittedLawView:
        """Fit a law to sweeps and store it. `fit`, errors: see `sweeps.launch.fit_sweeps`."""
        from escala.sweeps import launch

        found = launch.fit_sweeps(self.settings, names, law, **fit)
        return FittedLawView.of_fit(found.stored, found.champion)

    def preview_sweeps(self, names: Sequence[str], **fit: Any) -> LawPreviewView:
        """The law of `fit_sweeps`, not stored."""
        from escala.sweeps import launch

        return LawPreviewView.of_preview(launch.preview_sweeps(self.settings, names, **fit))

    def fit_file(self, file: str | Path | Sequence[str | Path], name: str, **fit: Any) -> FittedLawView:
        """Fit a law to a table and store it. `fit`, errors: see `laws.queries.fit_file`."""
        from escala.laws import queries

        found = queries.fit_file(self.settings, file, name, **fit)
        return FittedLawView.of_fit(found.stored, found.champion)

    def preview_file(self, file: str | Path | Sequence[str | Path], **fit: Any) -> LawPreviewView:
        """The law of `fit_file`, not stored; asks neither a database nor a tracker."""
        from escala.laws import queries

        return LawPreviewView.of_preview(queries.preview_file(file, **fit))

    def laws(self, name: str | None = None) -> list[LawVersionView]:
        """Every stored version, by name, newest first. Raises ClusterError, NotFoundError for an unknown name."""
        from escala.laws import queries

        return [LawVersionView.of_row(row) for row in queries.laws(self.settings, name)]

    def law(self, reference: str, refresh: bool = False) -> LawView:
        """A law in full: NAME@VERSION, or NAME for the champion. `escala.load_law` gives the law to compute with.

        Raises NotFoundError, LawError, ClusterError.
        """
        from escala.laws import queries

        return LawView.of_stored(queries.law(self.settings, reference, refresh))

    def predict_law(
        self, reference: str, at: Mapping[str, float], level: float = 0.9, refresh: bool = False
    ) -> PredictionView:
        """The loss at a point, `at` input -> value, with its predictive interval. Raises LawError, as `law`."""
        from escala.laws import queries

        found = queries.predict_law(self.settings, reference, at, level, refresh)
        return PredictionView.of_answer(found.law, found.prediction, found.assumed)

    def compare_laws(self, first: str, second: str) -> LawComparisonView:
        """Two laws side by side. Raises as `law`."""
        from escala.laws import queries

        found = queries.compare_laws(self.settings, first, second)
        return LawComparisonView(
            first=LawView.of_stored(found.first),
            second=LawView.of_stored(found.second),
            disagreement=found.disagreement,
            largest_disagreement=found.largest_disagreement,
        )

    def promote_law(self, reference: str, force: bool = False) -> LawView:
        """Make NAME@VERSION its name's champion. Raises LawError for an unhealthy one without `force`."""
        from escala.laws import queries

        return LawView.of_stored(queries.promote_law(self.settings, reference, force))

    def calibration(self, name: str | None = None) -> CalibrationView:
        """Predicted against obtained, for every run that finished while a law was champion (of `name`, or all)."""
        from escala.laws import queries

        return CalibrationView.of_checks(queries.calibration(self.settings, name))

    def export_law(self, reference: str, directory: str | Path) -> list[Path]:
        """law.json, provenance, points and plots into a new directory. Raises LawError where it is not empty."""
        from escala.laws import queries

        return queries.export_law(self.settings, reference, directory)

    def report_law(self, reference: str, file: str | Path) -> Path:
        """The law as one HTML file that needs nothing else. Raises as `law`, LawError for an unwritable file."""
        from escala.laws import queries

        return queries.report_law(self.settings, reference, file)

    def plot_law(self, reference: str, directory: str | Path) -> list[Path]:
        """The law's plots as PNG files in `directory`. Raises as `law`."""
        from escala.laws import queries

        return queries.plot_law(self.settings, reference, directory)
