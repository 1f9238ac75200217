"""How the rollout service looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from escala.cli.render import as_json, note, number, raw, table

if TYPE_CHECKING:
    from escala.views.rollouts import DeploymentView, RolloutsView


def status(found: RolloutsView, json: bool) -> None:
    """The service, its deployments a row each, its replicas a row each."""
    if json:
        as_json(found)
        return
    raw(f"{found.name}  {found.status}" + (f"  {found.address}" if found.address else ""))
    if found.status == "ABSENT":
        note("`escala rollouts up --set model=DIRECTORY` starts one")
        return
    if found.message:
        note(found.message)
    table(
        ("deployment", "status", "replicas", "bounds", "requests per replica"),
        [
            (d.name, d.status, d.target_replicas, _bounds(d), number(d.requests_per_replica))
            for d in found.deployments
        ],
    )
    serves = (found.weights or {}).get("replicas", {})
    rows = [
        (d.name, r.id, r.state, r.pid, r.node, _version(serves, r.id))
        for d in found.deployments
        for r in d.replicas
    ]
    table(("deployment", "replica", "state", "pid", "node", "weights"), rows)


def _bounds(deployment: DeploymentView) -> str | None:
    if deployment.max_replicas is None:
        return None
    return f"{deployment.min_replicas} to {deployment.max_replicas}"


def _version(serves: dict[str, int], replica: str) -> str | None:
    return next((f"v{version}" for name, version in serves.items() if name.endswith(f"#{replica}")), None)
