"""How the rollout service looks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from escala.cli.render import as_json, note, number, raw, table

if TYPE_CHECKING:
    from escala.views.rollouts import DeploymentView, ReplayView, RolloutsView, TunedView


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
    if found.used is not None and found.used["record"]:
        _used(found.used["record"], found.used["replicas"])


def _used(record: dict[str, Any], notes: dict[str, dict[str, Any]]) -> None:
    """Energy by replica, what the governor wants, what replicas can set."""
    gone = record["gone"]
    parts = [*record["replicas"].items(), (f"{gone['count']} that are gone", gone), ("all", record)]
    table(
        ("energy of", "joules", "per token", "gCO2e", "is", "power", "counter"),
        [
            (
                name,
                number(part["joules"]),
                number(part["joules_per_token"]),
                number(part["gco2e"]),
                part["energy_source"],
                notes.get(name, {}).get("power"),
                notes.get(name, {}).get("energy"),
            )
            for name, part in parts
            if part["tokens"] or name == "all"
        ],
    )
    targets = record["targets"]
    if targets is not None:
        bounds = f"{targets['min_replicas']} to {targets['max_replicas']} replicas"
        others = {"capacity factor": targets["capacity_factor"], "power": targets["power_share"]}
        said = "".join(f", {name} {value:g}" for name, value in others.items() if value is not None)
        raw(f"governor: {bounds}, batch {targets['batch_limit']}{said}; {targets['reason']}")


def tuned(found: TunedView, json: bool) -> None:
    """The plant, and how stable the gains are on it."""
    if json:
        as_json(found)
        return
    raw(
        f"plant   gain {found.gain:.3g} of the target a replica (s.e. {found.gain_error:.2g}), time constant "
        f"{found.time_constant_windows:.3g} windows, delay {found.delay_windows:.3g} windows; "
        f"{found.explained:.0%} of the test explained"
    )
    raw(
        f"gains   kp {found.kp:.3g}, ki {found.ki:.3g}: spectral radius {found.spectral_radius:.3f}, at twice the gain "
        f"{found.spectral_radius_twice:.3f}"
    )
    note(f"written to {found.path}; `escala rollouts up --governor {found.path} ...` keeps it")


def replayed(found: list[ReplayView], json: bool) -> None:
    """A row for each way to scale."""
    if json:
        as_json(found)
        return
    table(
        ("scaled by", "requests", "p50 s", "p95 s", "first token p95 s", "replica-seconds", "changes"),
        [
            (
                each.controller,
                each.requests,
                f"{each.latency_p50_seconds:.1f}",
                f"{each.latency_p95_seconds:.1f}",
                f"{each.ttft_p95_seconds:.1f}",
                f"{each.replica_seconds:.0f}",
                len(each.counts) - 1,
            )
            for each in found
        ],
    )


def _bounds(deployment: DeploymentView) -> str | None:
    if deployment.max_replicas is None:
        return None
    return f"{deployment.min_replicas} to {deployment.max_replicas}"


def _version(serves: dict[str, int], replica: str) -> str | None:
    return next((f"v{version}" for name, version in serves.items() if name.endswith(f"#{replica}")), None)
