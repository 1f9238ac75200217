"""The rollout service."""

from __future__ import annotations

from typing import Any

from escala.views.base import View


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
    `weights`: the newest version, and what each replica serves; None: nobody answers.
    """

    name: str
    status: str
    message: str
    address: str | None
    model: str | None
    deployments: tuple[DeploymentView, ...]
    weights: dict[str, Any] | None
