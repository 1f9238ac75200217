"""The rollout service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from escala.views.base import View

if TYPE_CHECKING:
    from escala.rollouts.simulator import Replayed
    from escala.rollouts.tuning import Tuned


class ReplicaView(View):
    """One process of a deployment. `state` is Serve's: STARTING, RUNNING, STOPPING, ..."""

    id: str
    state: str
    pid: int | None
    node: str | None


class DeploymentView(View):
    """One part of the service; bounds are None where it does not scale."""

    name: str
    status: str
    message: str
    target_replicas: int
    min_replicas: int | None
    max_replicas: int | None
    requests_per_replica: float | None
    replicas: tuple[ReplicaView, ...]


class RolloutsView(View):
    """The service. `status` is Serve's (DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED, ...), or ABSENT.
    `weights`: the newest version, and what each replica serves; `used`: what the service used, by replica, what the
    governor wants, and what replicas can set; None: nobody answers.
    """

    name: str
    status: str
    message: str
    address: str | None
    model: str | None
    deployments: tuple[DeploymentView, ...]
    weights: dict[str, Any] | None
    used: dict[str, Any] | None


class TunedView(View):
    """A step test's plant, in windows, and the gains: how stable they are there and at twice the gain. `errors`:
    (seconds after the step, share of the target). `path`: the governor's file.
    """

    gain: float
    gain_error: float
    time_constant_windows: float
    delay_windows: float
    explained: float
    kp: float
    ki: float
    spectral_radius: float
    spectral_radius_twice: float
    errors: tuple[tuple[float, float], ...]
    path: str

    @classmethod
    def of_tuned(cls, found: Tuned, path: str) -> TunedView:
        """Of `escala.rollouts.tuning.tune`."""
        from escala.rollouts.stability import SAFETY_FACTOR, spectral_radius  # numpy

        config, plant = found.config, found.config.plant
        radii = [
            spectral_radius(config.kp, config.ki, factor * plant.gain, plant.time_constant, plant.delay)
            for factor in (1.0, SAFETY_FACTOR)
        ]
        return cls(
            gain=plant.gain,
            gain_error=found.fit.gain_error,
            time_constant_windows=plant.time_constant,
            delay_windows=plant.delay,
            explained=found.fit.explained,
            kp=config.kp,
            ki=config.ki,
            spectral_radius=radii[0],
            spectral_radius_twice=radii[1],
            errors=found.errors,
            path=path,
        )


class ReplayView(View):
    """A trace on a simulated service, governed or not (`controller`)."""

    controller: str
    requests: int
    latency_p50_seconds: float
    latency_p95_seconds: float
    ttft_p95_seconds: float
    replica_seconds: float
    counts: tuple[tuple[float, int], ...]
    held_windows: int

    @classmethod
    def of_replayed(cls, controller: str, found: Replayed) -> ReplayView:
        """Of `escala.rollouts.simulator.replay`."""
        return cls(
            controller=controller,
            requests=len(found.responses),
            latency_p50_seconds=found.percentile(0.5),
            latency_p95_seconds=found.percentile(0.95),
            ttft_p95_seconds=found.percentile(0.95, first_token=True),
            replica_seconds=found.replica_seconds,
            counts=found.counts,
            held_windows=found.held,
        )
