"""Runs in the tracker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from escala.client.home import Home
from escala.views.run_records import RunDetailsView, RunView, SampleView


class RunMethods(Home):
    """See the module."""

    def runs(
        self,
        job: str | None = None,
        workload: str | None = None,
        status: str | None = None,
        name: str | None = None,
        limit: int = 50,
    ) -> list[RunView]:
        """Runs that match all filters given, newest first. Errors as `jobs.tracked_runs.runs`."""
        from escala.jobs import tracked_runs

        return [
            RunView.of(each) for each in tracked_runs.runs(self.settings, job, workload, status, name, limit)
        ]

    def run(self, name: str) -> RunDetailsView:
        """The run with this id (or its start), or the last one of the job with this id or name; with its page.

        Raises NotFoundError, ClusterError.
        """
        from escala.jobs import tracked_runs

        record = tracked_runs.run(self.settings, name)
        return RunDetailsView.with_page(record, tracked_runs.page(self.settings, record))

    def finished_run(self, name: str, wait_seconds: float = 120.0) -> RunDetailsView:
        """The last run of a job that has ended, as soon as the tracker has all of it. Raises NotFoundError, StateError
        where that takes longer than `wait_seconds`.
        """
        from escala.jobs import tracked_runs

        record = tracked_runs.finished_run(self.settings, name, wait_seconds)
        return RunDetailsView.with_page(record, tracked_runs.page(self.settings, record))

    def run_url(self, run: str) -> str:
        """The run's page in MLflow. Raises NotFoundError, ClusterError."""
        from escala.jobs import tracked_runs

        return tracked_runs.run_url(self.settings, tracked_runs.run(self.settings, run))

    def history(self, run: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of each point of a run's metric, by step; empty for one that it has not."""
        from escala.jobs import tracked_runs

        return tracked_runs.history(self.settings, tracked_runs.run(self.settings, run), metric)

    def samples(self, run: str, last: int | None = None) -> list[SampleView]:
        """What a policy said in a `ppo` run; the newest `last`, None: all. Raises NotFoundError, SpecError."""
        from escala.jobs import tracked_runs

        record = tracked_runs.run(self.settings, run)
        return [SampleView.of(row) for row in tracked_runs.samples(self.settings, record, last)]

    def compare(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Where the records of runs differ: field -> a value for each run; `run_id` names the columns."""
        from escala.jobs import tracked_runs

        return tracked_runs.compare(self.settings, names)
