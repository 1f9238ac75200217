"""Ray Serve's REST interface: asked, and what it says of our application as records."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from escala import http_client
from escala.contract.errors import ClusterError
from escala.managed import head_token
from escala.settings import Settings

ANSWER_SECONDS = 60.0  # Serve's first start happens within one request


@dataclass(frozen=True)
class Replica:
    """One process of a deployment. `state` is Serve's: STARTING, RUNNING, STOPPING, ..."""

    id: str
    state: str
    pid: int | None
    node: str | None


@dataclass(frozen=True)
class Deployment:
    """One part of the service; bounds are None where it does not scale."""

    name: str
    status: str
    message: str
    target_replicas: int
    min_replicas: int | None
    max_replicas: int | None
    requests_per_replica: float | None
    replicas: tuple[Replica, ...]


@dataclass(frozen=True)
class RolloutsStatus:
    """The service. `status` is Serve's (DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED, ...), or ABSENT."""

    name: str
    status: str
    message: str = ""
    address: str | None = None
    model: str | None = None
    deployments: tuple[Deployment, ...] = field(default_factory=tuple)
    weights: dict[str, Any] | None = None
    """The newest version, and what each replica serves; None: no answer."""
    used: dict[str, Any] | None = None
    """Energy by replica, what the governor wants, what replicas can set; None: no answer."""


def details_of(settings: Settings) -> dict[str, Any]:
    """Everything that Serve says of itself; empty where it does not run. Raises ClusterError."""
    found: dict[str, Any] = json.loads(call(settings, "GET") or b"{}")
    return found


def listens_at(details: dict[str, Any]) -> dict[str, Any]:
    """Where a running Serve listens; empty for one without HTTP."""
    found = details.get("http_options") or {}
    return {key: found[key] for key in ("host", "port") if key in found}


def how_served(details: dict[str, Any]) -> dict[str, Any]:
    """How Serve runs, as it takes it back."""
    return {"proxy_location": details["proxy_location"], "http_options": listens_at(details)}


def call(settings: Settings, method: str, payload: dict[str, Any] | None = None) -> bytes:
    """What the interface answers. Raises ClusterError where it refuses, or does not answer."""
    token = head_token(settings)
    try:
        answer = http_client.request(
            f"{settings.ray_dashboard}/api/serve/applications/",
            method=method,
            token=token,
            payload=payload,
            timeout_seconds=ANSWER_SECONDS,
        )
    except OSError as error:
        raise ClusterError(
            f"{settings.ray_dashboard} does not answer: {error}", "`escala up` starts the cluster"
        ) from error
    if not answer.succeeded:
        raise ClusterError(f"Ray Serve refuses: {answer.text[-1500:]}", "`escala rollouts status`")
    return answer.body


def configs_of(details: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was asked for of each application that was put by this interface."""
    found = {n: a.get("deployed_app_config") for n, a in details.get("applications", {}).items()}
    return {name: config for name, config in found.items() if config}


def status_of(details: dict[str, Any], name: str) -> RolloutsStatus:
    """An application in Serve's details, without its weights."""
    application = details.get("applications", {}).get(name)
    if application is None:
        return RolloutsStatus(name, "ABSENT")
    http = details.get("http_options") or {}
    address = f"http://{http['host']}:{http['port']}" if http.get("port") else None
    deployments = tuple(_deployment(d) for d in application.get("deployments", {}).values())
    args = (application.get("deployed_app_config") or {}).get("args", {})
    return RolloutsStatus(
        name, application["status"], application.get("message", ""), address, args.get("model"), deployments
    )


def _deployment(found: dict[str, Any]) -> Deployment:
    scaling = found["deployment_config"].get("autoscaling_config") or {}
    replicas = [
        Replica(r["replica_id"], r["state"], r.get("pid"), r.get("node_ip")) for r in found["replicas"]
    ]
    return Deployment(
        found["name"],
        found["status"],
        found.get("message", ""),
        found.get("target_num_replicas", len(replicas)),
        scaling.get("min_replicas"),
        scaling.get("max_replicas"),
        scaling.get("target_ongoing_requests"),
        tuple(replicas),
    )
