"""Sweeps: planned, queued, read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from escala.client.home import Home
from escala.report import Report, silent
from escala.views.jobs import JobView
from escala.views.sweeps import DemoSpaceView, SweepPlanView, SweepPointsView


class SweepMethods(Home):
    """See the module."""

    def plan_sweep(
        self,
        space: str,
        overrides: Iterable[str] = (),
        code: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> SweepPlanView:
        """What a sweep would train and cost; starts nothing. Args and errors as `sweeps.launch.plan_sweep`."""
        from escala.sweeps import launch

        return SweepPlanView.of(launch.plan_sweep(self.settings, space, overrides, code, options))

    def sweep(
        self,
        space: str,
        overrides: Iterable[str] = (),
        options: Mapping[str, Any] | None = None,
        resume: bool = False,
        report: Report = silent,
        code: str | Path | None = None,
        seal: str | None = None,
    ) -> JobView:
        """Queue a sweep, or the last interrupted one again. Args and errors as `sweeps.launch.sweep`."""
        from escala.sweeps import launch

        return JobView.of(launch.sweep(self.settings, space, overrides, options, resume, report, code, seal))

    def sweep_points(self, name: str) -> SweepPointsView:
        """The points of a sweep so far, and the refused ones. `name`: its job's id, or a name, whose newest is meant.

        Raises NotFoundError.
        """
        from escala.sweeps import launch

        return SweepPointsView.of_points(name, launch.sweep_points(self.settings, name))

    def space_base(self, space: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
        """The configuration that a space's trials share, for a run that is to be compared with them."""
        from escala.sweeps import launch

        return launch.space_base(space, overrides)

    def demo_space(self, minutes: float, seed: int) -> DemoSpaceView:
        """What this machine does now, measured for seconds, and the demo's sweep that fits. Raises ClusterError."""
        from escala.sweeps import demo_space, machine

        base = self.space_base(demo_space.NAME)
        speed = machine.measure(base)
        return DemoSpaceView.of_space(speed, demo_space.demo_space(speed, minutes, seed, base))
