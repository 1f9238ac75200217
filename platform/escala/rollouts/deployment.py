"""The rollout service on a cluster: started, looked at, bounded and removed by Ray Serve's REST interface.

No driver of ours stays: Serve's controller builds the application on the cluster. Its interface takes the whole list
of applications, so that ours is put beside those that are there. A configuration file is Serve's own
(`serve deploy FILE` takes it too); `up` adds the bounds as an override of the deployment, where `scale` can move them
without a restart of replicas.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from escala import preflight, spec
from escala.contract.checkpoints import check_readable
from escala.contract.errors import ClusterError, NotFoundError, SpecError, StateError
from escala.managed import head_token
from escala.runtime_env import runtime_env
from escala.settings import RolloutsSettings, Settings
from escala.storage import user_code

APPLICATION = "escala"
IMPORT_PATH = "workloads.serve:application"
POLICY = "policy"
START_SECONDS = 600.0
POLL_SECONDS = 0.5
TELL_SECONDS = 15.0  # what takes long says at least so often that it goes on
ANSWER_SECONDS = 60.0  # Serve's first start happens within one request
Report = Callable[[str], None]
WEIGHTS_SECONDS = 5.0
# No proxy: a machine-wide http_proxy would carry requests for 127.0.0.1 away.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


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
    weights: dict[str, Any] | None = (
        None  # newest version, and what each replica serves; None: nobody answers
    )


def up(
    settings: Settings,
    rollouts: RolloutsSettings,
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    name: str = APPLICATION,
    report: Report = lambda line: None,
    wait_seconds: float = START_SECONDS,
    code: str | Path | None = None,
    resolve: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> RolloutsStatus:
    """Start the service, or bring it to this configuration, and wait until it answers.

    Args:
        files: Serve configuration files with one application, ours; later ones override earlier ones.
        overrides: `a.b=value` of the application's arguments (`escala.schema.serve.ServeConfig`).
        code: the directory of the user's modules (see `preflight.ready`).
        resolve: arguments that name jobs -> arguments with their checkpoints.

    Raises SpecError for what does not validate, and for an address beyond loopback without a token; CheckpointError for
    a job's checkpoints that are all refused; StateError where Serve runs without HTTP; ClusterError where the cluster
    or the service does not come up in time, with Serve's own message.
    """
    document = read(files, overrides)
    http: dict[str, Any] = {"host": rollouts.host, "port": rollouts.port}
    http |= document.get("http_options") or {}
    written = document["applications"][0]
    written = {**written, "args": resolve(written["args"])}
    application = prepare(written, name, settings, rollouts, code)
    if (model := Path(str(application["args"]["model"]))).is_dir():
        check_readable(model)
    if settings.ray_address is None:
        from escala import cluster

        cluster.up(settings, report)
    details = _details(settings)
    if details.get("applications"):  # Serve keeps what it was started with
        http = _http(details)
        if not http:
            raise StateError(
                "Serve runs here for a `ppo` job, which started it without HTTP: nobody could ask this service",
                "wait until `escala ps` shows no `ppo` job, then start it again",
            )
    check_exposure(http["host"], application["args"])
    others = {n: c for n, c in _configs(details).items() if n != name}
    payload = {
        "proxy_location": "EveryNode",
        "http_options": http,
        "applications": [*others.values(), application],
    }
    report(f"{name}: asking Ray Serve for it")
    _call(settings, "PUT", payload)
    return _wait(settings, name, wait_seconds, report)


def status(
    settings: Settings, rollouts: RolloutsSettings, name: str = APPLICATION, weights: bool = True
) -> RolloutsStatus:
    """The service as it is; with `weights` its replicas are asked for theirs, which takes as long as they are busy.

    Raises ClusterError where the cluster does not answer.
    """
    found = _status(_details(settings), name)
    if not weights or found.address is None:  # without HTTP nobody can be asked
        return found
    awake = any(r.state == "RUNNING" for d in found.deployments if d.name == POLICY for r in d.replicas)
    return replace(found, weights=_weights(found, rollouts)) if awake else found


def scale(
    settings: Settings,
    min_replicas: int | None = None,
    max_replicas: int | None = None,
    requests_per_replica: float | None = None,
    name: str = APPLICATION,
) -> RolloutsStatus:
    """Move the bounds, and what one replica is worth; None: as it is. The scaling policy alone sets the count.

    Raises NotFoundError where there is no such service, StateError for one that `up` did not start, SpecError for
    bounds that cannot hold.
    """
    details = _details(settings)
    configs = _configs(details)
    if name not in details.get("applications", {}):
        raise NotFoundError(f"there is no rollout service {name!r}", "`escala rollouts up FILE` starts one")
    scaling = _scaling(configs.get(name, {}))
    if scaling is None:
        raise StateError(
            f"{name} was not started by `escala rollouts up`: its bounds cannot move without a restart",
            "start it with `escala rollouts up FILE`: its replicas restart once",
        )
    wanted = {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "target_ongoing_requests": requests_per_replica,
    }
    scaling.update({key: value for key, value in wanted.items() if value is not None})
    check_bounds(scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"])
    _call(settings, "PUT", {**_served(details), "applications": list(configs.values())})
    return _wait(settings, name, START_SECONDS, lambda line: None, scaling)


def down(
    settings: Settings,
    name: str = APPLICATION,
    report: Report = lambda line: None,
    wait_seconds: float = START_SECONDS,
) -> None:
    """Remove the service: running responses are finished first. Other applications stay; without any, Serve ends.

    Raises NotFoundError where there is no such service, ClusterError where it does not go in time.
    """
    details = _details(settings)
    if name not in details.get("applications", {}):
        raise NotFoundError(
            f"there is no rollout service {name!r}", "`escala rollouts status` shows what there is"
        )
    others = [config for other, config in _configs(details).items() if other != name]
    _call(settings, "PUT", {**_served(details), "applications": others})
    report(f"{name}: finishing what runs")
    deadline = time.monotonic() + wait_seconds
    while name in (left := _details(settings).get("applications", {})):
        if time.monotonic() > deadline:
            raise ClusterError(f"{name} is not gone after {wait_seconds:g} s", "`escala rollouts status`")
        time.sleep(POLL_SECONDS)
    if not left:
        _call(settings, "DELETE")
    report(f"{name}: down")


def read(files: Iterable[str | Path], overrides: Iterable[str]) -> dict[str, Any]:
    """A Serve configuration with our one application in it, overrides on its arguments.

    Raises SpecError where there are several applications, or one of another import path.
    """
    document = spec.written(files, ())
    applications = document.get("applications") or [{"import_path": IMPORT_PATH}]
    ours = isinstance(applications, list) and len(applications) == 1 and isinstance(applications[0], dict)
    if not ours or applications[0].get("import_path") != IMPORT_PATH:
        raise SpecError(
            "the file does not hold one application, of the rollout service",
            f"write `applications:` with one item, whose import_path is {IMPORT_PATH}",
        )
    application = dict(applications[0])
    args = dict(application.get("args") or {})
    for override in overrides:
        spec.apply_override(args, override)
    return {**document, "applications": [{**application, "args": args}]}


def prepare(
    application: dict[str, Any],
    name: str,
    settings: Settings,
    rollouts: RolloutsSettings,
    code: str | Path | None = None,
) -> dict[str, Any]:
    """The application as it is sent: arguments checked and complete, environment, bounds. Raises SpecError."""
    args = dict(application["args"])
    if rollouts.token is not None:
        args.setdefault(
            "token_sha256", hashlib.sha256(rollouts.token.get_secret_value().encode()).hexdigest()
        )
    args.setdefault("hold_places", settings.ray_address is None)
    config = spec.load_rollouts(args)
    overrides = [d for d in application.get("deployments") or [] if d.get("name") != POLICY]
    plain = config.model_dump(mode="json")
    digest = None
    if plain["reward"]:
        digest = preflight.ready({}, plain, settings.home, code)
    copy = user_code.directory(settings.home, digest) if digest else None
    environment = runtime_env(settings.gcs_address, gpus=config.replica_gpus > 0, code=copy)
    return {
        "route_prefix": "/",
        **application,
        "name": name,
        "args": plain,
        "runtime_env": application.get("runtime_env") or environment,
        "deployments": [*overrides, {"name": POLICY, "autoscaling_config": config.autoscaling()}],
    }


def check_exposure(host: str, args: dict[str, Any]) -> None:
    """Raise SpecError for an address beyond this machine without a token."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not args.get("token_sha256"):
        raise SpecError(
            f"the service would answer everybody who reaches {host}, without a token",
            "set ESCALA_ROLLOUTS_TOKEN (16 characters or more), or leave ESCALA_ROLLOUTS_HOST at 127.0.0.1",
        )


def check_bounds(least: int, most: int, requests: float) -> None:
    """Raise SpecError for bounds that cannot hold."""
    if not 0 <= least <= most or most < 1 or requests <= 0:
        raise SpecError(
            f"{least} to {most} replicas for {requests:g} requests each cannot hold",
            "give 0 <= min <= max, a max of at least 1, and requests above 0",
        )


def _wait(
    settings: Settings, name: str, seconds: float, report: Report, scaling: dict[str, Any] | None = None
) -> RolloutsStatus:
    """Until the service runs (None), or has the bounds of `scaling`, or has failed."""
    started = time.monotonic()
    deadline, last, told = started + seconds, "", started
    while True:
        found, now = _status(_details(settings), name), time.monotonic()
        line = f"{found.status}" + "".join(f", {d.name} {d.status}" for d in found.deployments)
        if line != last or now - told >= TELL_SECONDS:
            report(f"{name}: {line}" + (f" ({now - started:.0f} s)" if line == last else ""))
            last, told = line, now
        if found.status == "RUNNING" if scaling is None else _has_bounds(found, scaling):
            return found
        if found.status in ("DEPLOY_FAILED", "UNHEALTHY") or time.monotonic() > deadline:
            said = [found.message, *(d.message for d in found.deployments if d.message)]
            raise ClusterError(
                f"{name} is {found.status}: {' '.join(filter(None, said)).strip()[-1500:]}",
                "correct the configuration and repeat, or `escala rollouts down`",
            )
        time.sleep(POLL_SECONDS)


def _has_bounds(found: RolloutsStatus, scaling: dict[str, Any]) -> bool:
    wanted = tuple(scaling[key] for key in ("min_replicas", "max_replicas", "target_ongoing_requests"))
    return any((d.min_replicas, d.max_replicas, d.requests_per_replica) == wanted for d in found.deployments)


def _status(details: dict[str, Any], name: str) -> RolloutsStatus:
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


def _weights(found: RolloutsStatus, rollouts: RolloutsSettings) -> dict[str, Any] | None:
    """What the service says of its weight versions; None where it does not answer us."""
    token = rollouts.token and rollouts.token.get_secret_value()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{found.address}/weights", headers=headers)
    try:
        with _OPENER.open(request, timeout=WEIGHTS_SECONDS) as response:
            answer: dict[str, Any] = json.loads(response.read())
            return answer
    except OSError:
        return None


def _configs(details: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was asked for of each application that was put by this interface."""
    found = {n: a.get("deployed_app_config") for n, a in details.get("applications", {}).items()}
    return {name: config for name, config in found.items() if config}


def _scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    """The bounds in an application's configuration, to be changed in place; None where there are none."""
    for deployment in config.get("deployments") or []:
        if deployment.get("name") == POLICY and deployment.get("autoscaling_config"):
            scaling: dict[str, Any] = deployment["autoscaling_config"]
            return scaling
    return None


def _details(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_call(settings, "GET") or b"{}")
    return found


def _http(details: dict[str, Any]) -> dict[str, Any]:
    """Where a running Serve listens; empty for one without HTTP."""
    found = details.get("http_options") or {}
    return {key: found[key] for key in ("host", "port") if key in found}


def _served(details: dict[str, Any]) -> dict[str, Any]:
    """How Serve runs, as it takes it back."""
    return {"proxy_location": details["proxy_location"], "http_options": _http(details)}


def _call(settings: Settings, method: str, payload: dict[str, Any] | None = None) -> bytes:
    token = head_token(settings)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if payload is not None:
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(
        f"{settings.ray_dashboard}/api/serve/applications/",
        data=None if payload is None else json.dumps(payload).encode(),
        headers=headers,
        method=method,
    )
    try:
        with _OPENER.open(request, timeout=ANSWER_SECONDS) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()
        raise ClusterError(f"Ray Serve refuses: {said[-1500:]}", "`escala rollouts status`") from error
    except OSError as error:
        raise ClusterError(
            f"{settings.ray_dashboard} does not answer: {error}", "`escala up` starts the cluster"
        ) from error
