"""The cluster and the rollout service on it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from escala.client.home import Home
from escala.report import Report, silent
from escala.views.cluster import ClusterView
from escala.views.rollouts import RolloutsView

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
    ) -> RolloutsView:
        """Start the rollout service and wait for it. Args and errors as of `escala.rollouts.deployment.up`."""
        from escala.jobs.references import resolve_rollouts
        from escala.rollouts import deployment
        from escala.settings import RolloutsSettings

        resolve = partial(resolve_rollouts, self.settings)
        return RolloutsView.of(
            deployment.up(
                self.settings, RolloutsSettings(), files, overrides, name, report, code=code, resolve=resolve
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

    def rollouts_down(self, name: str = ROLLOUTS, report: Report = silent) -> None:
        """Remove the rollout service, what it generates finished first. Raises NotFoundError, ClusterError."""
        from escala.rollouts import deployment

        deployment.down(self.settings, name, report)
