"""The cluster and the rollout service on it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from escala.client.home import Home
from escala.contract.errors import SpecError
from escala.contract.files import write_whole
from escala.report import Report, silent
from escala.views.cluster import ClusterView
from escala.views.rollouts import ReplayView, RolloutsView, TunedView

if TYPE_CHECKING:
    from escala.rollouts.tuning import TuneOptions

ROLLOUTS = "escala"  # the name of the rollout service


class ClusterMethods(Home):
    """See the module."""

    def up(self, report: Report = silent) -> ClusterView:
        """Start what is missing of the embedded cluster. Raises ClusterError, naming a taken port or a dead process."""
        from escala import cluster

        return ClusterView.of(cluster.up(self.settings, report))

    def down(self, report: Report = silent) -> None:
        """End the processes that `up` started, and no others."""
        from escala import cluster

        cluster.down(self.settings, report)

    def status(self) -> ClusterView:
        """The processes of the cluster and whether they answer."""
        from escala import cluster

        return ClusterView.of(cluster.status(self.settings))

    def trouble(self) -> str | None:
        """Why no job moves on now, and what to do; None where nothing stands in the way. Milliseconds."""
        from escala import cluster

        return cluster.trouble(self.settings)

    def rollouts_up(
        self,
        files: Iterable[str | Path] = (),
        overrides: Iterable[str] = (),
        name: str = ROLLOUTS,
        report: Report = silent,
        code: str | Path | None = None,
        governor: Path | None = None,
    ) -> RolloutsView:
        """Start the rollout service and wait for it. Args and errors as of `escala.rollouts.deployment.up`."""
        from escala.jobs.references import resolve_rollouts
        from escala.rollouts import deployment
        from escala.settings import RolloutsSettings

        resolve = partial(resolve_rollouts, self.settings)
        return RolloutsView.of(
            deployment.up(
                self.settings,
                RolloutsSettings(),
                files,
                overrides,
                name,
                report,
                code=code,
                governor=governor,
                resolve=resolve,
            )
        )

    def rollouts_status(self, name: str = ROLLOUTS, weights: bool = True) -> RolloutsView:
        """The rollout service as it is; with `weights` its replicas are asked for theirs, which takes as long as they
        are busy. Raises ClusterError where the cluster does not answer.
        """
        from escala.rollouts import deployment
        from escala.settings import RolloutsSettings

        return RolloutsView.of(deployment.status(self.settings, RolloutsSettings(), name, weights))

    def rollouts_scale(
        self,
        min_replicas: int | None = None,
        max_replicas: int | None = None,
        requests_per_replica: float | None = None,
        name: str = ROLLOUTS,
    ) -> RolloutsView:
        """Move the bounds of the scaling policy. Errors as of `escala.rollouts.deployment.scale`."""
        from escala.rollouts import deployment

        return RolloutsView.of(
            deployment.scale(self.settings, min_replicas, max_replicas, requests_per_replica, name)
        )

    def rollouts_tune(
        self, options: TuneOptions, path: Path, name: str = ROLLOUTS, report: Report = silent
    ) -> TunedView:
        """A step test on the running service, and the governor's file from it. Errors as of
        `escala.rollouts.tuning.tune`, SpecError where the file is there already.
        """
        from escala import documents
        from escala.rollouts import tuning
        from escala.settings import RolloutsSettings

        if path.exists():
            raise SpecError(f"{path} is there already", "name another file, or remove it")
        found = tuning.tune(self.settings, RolloutsSettings(), options, name, report)
        write_whole(path, documents.dump(found.config.model_dump(mode="json")).encode())
        return TunedView.of_tuned(found, str(path))

    def rollouts_replay(
        self, trace: Path, governor: Path, min_replicas: int = 1, max_replicas: int = 2
    ) -> list[ReplayView]:
        """A trace on a simulated service, governed and by the policy alone. Raises NotFoundError, SpecError."""
        from escala.rollouts import deployment, simulator
        from escala.rollouts.policy import Rules
        from escala.rollouts.traces import read_trace
        from escala.schema.serve import ScalingConfig

        config = deployment.read_governor(governor)
        if config.replica is None:
            raise SpecError(
                f"{governor} does not say how fast a replica is", "`escala rollouts tune` measures it"
            )
        try:
            scaling = ScalingConfig(min_replicas=min_replicas, max_replicas=max_replicas)
        except ValueError as error:
            raise SpecError(
                f"{min_replicas} to {max_replicas} replicas cannot hold",
                "give 0 <= --min <= --max, --max of 1 or more",
            ) from error
        rules = Rules(
            scaling.min_replicas,
            scaling.max_replicas,
            float(config.replica.batches[-1].requests),
            scaling.drain_seconds,
            scaling.up_seconds,
            scaling.down_seconds,
            scaling.spare,
        )
        arrivals = read_trace(trace)
        return [
            ReplayView.of_replayed(name, simulator.replay(arrivals, config.replica, rules, each))
            for name, each in (("governor", config), ("policy alone", None))
        ]

    def rollouts_down(self, name: str = ROLLOUTS, report: Report = silent) -> None:
        """Remove the rollout service, what it generates finished first. Raises NotFoundError, ClusterError."""
        from escala.rollouts import deployment

        deployment.down(self.settings, name, report)
