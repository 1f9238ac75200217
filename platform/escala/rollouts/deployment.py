"""The rollout service on a cluster: started, looked at, bounded and removed by Ray Serve's REST interface.

No driver of ours stays: Serve's controller builds the application on the cluster. Its interface takes the whole list
of applications, so that ours is put beside those that are there. A configuration file is Serve's own
(`serve deploy FILE` takes it too); `up` adds the bounds as an override of the deployment, where `scale` can move them
without a restart of replicas.
"""

from __future__ import annotations

import hashlib
import ipaddress
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from escala import documents, http_client, preflight, spec
from escala.contract.errors import ClusterError, NotFoundError, SpecError, StateError
from escala.hardware import load_cluster
from escala.report import Report, silent
from escala.rollouts.governed import rules_of
from escala.rollouts.governor import Governor
from escala.rollouts.serve_interface import (
    RolloutsStatus,
    call,
    configs_of,
    details_of,
    how_served,
    listens_at,
    status_of,
)
from escala.runtime_env import job_variables, runtime_env
from escala.schema.governor import GovernorConfig
from escala.settings import RolloutsSettings, Settings
from escala.storage import user_code
from escala.storage.checkpoints import check_readable, open_checkpoints

APPLICATION = "escala"
IMPORT_PATH = "workloads.serve:application"
POLICY = "policy"
START_SECONDS = 600.0
POLL_SECONDS = 0.5
TELL_SECONDS = 15.0  # what takes long says at least so often that it goes on
WEIGHTS_SECONDS = 5.0


def up(
    settings: Settings,
    rollouts: RolloutsSettings,
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    name: str = APPLICATION,
    report: Report = silent,
    wait_seconds: float = START_SECONDS,
    code: str | Path | None = None,
    governor: Path | None = None,
    resolve: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> RolloutsStatus:
    """Start the service, or bring it to this configuration, and wait until it answers.

    Args:
        files: Serve configuration files with one application, ours; later ones override earlier ones.
        overrides: `a.b=value` of the application's arguments (`escala.schema.serve.ServeConfig`).
        code: the directory of the user's modules (see `preflight.ready`).
        governor: its file (`escala.schema.governor.GovernorConfig`); None: as the arguments say.
        resolve: arguments that name jobs -> arguments with their checkpoints.

    Raises SpecError for what does not validate, and for an address beyond loopback without a token; CheckpointError for
    a job's checkpoints that are all refused; StateError where Serve runs without HTTP; ClusterError where the cluster
    or the service does not come up in time, with Serve's own message.
    """
    document = read(files, overrides)
    http: dict[str, Any] = {"host": rollouts.host, "port": rollouts.port}
    http |= document.get("http_options") or {}
    written = document["applications"][0]
    if governor is not None:
        written["args"]["governor"] = read_governor(governor).model_dump(mode="json")
    written = {**written, "args": resolve(written["args"])}
    application = prepare(written, name, settings, rollouts, code)
    if (model := Path(str(application["args"]["model"]))).is_dir():
        check_readable(open_checkpoints(model))
    if settings.ray_address is None:
        from escala import cluster

        cluster.up(settings, report)
    details = details_of(settings)
    if details.get("applications"):  # Serve keeps what it was started with
        http = listens_at(details)
        if not http:
            raise StateError(
                "Serve runs here for a `ppo` job, which started it without HTTP: nobody could ask this service",
                "wait until `escala ps` shows no `ppo` job, then start it again",
            )
    check_exposure(http["host"], application["args"])
    others = {n: c for n, c in configs_of(details).items() if n != name}
    payload = {
        "proxy_location": "EveryNode",
        "http_options": http,
        "applications": [*others.values(), application],
    }
    report(f"{name}: asking Ray Serve for it")
    call(settings, "PUT", payload)
    return _wait(settings, name, wait_seconds, report)


def status(
    settings: Settings, rollouts: RolloutsSettings, name: str = APPLICATION, weights: bool = True
) -> RolloutsStatus:
    """The service as it is; with `weights` its replicas are asked for theirs, which takes as long as they are busy.

    Raises ClusterError where the cluster does not answer.
    """
    found = status_of(details_of(settings), name)
    if not weights or found.address is None:  # without HTTP there is no address to ask
        return found
    used = _answer(found, rollouts, "service")
    awake = any(r.state == "RUNNING" for d in found.deployments if d.name == POLICY for r in d.replicas)
    return replace(found, used=used, weights=_answer(found, rollouts, "weights") if awake else None)


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
    details = details_of(settings)
    configs = configs_of(details)
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
    call(settings, "PUT", {**how_served(details), "applications": list(configs.values())})
    return _wait(settings, name, START_SECONDS, lambda line: None, scaling)


def down(
    settings: Settings,
    name: str = APPLICATION,
    report: Report = silent,
    wait_seconds: float = START_SECONDS,
) -> None:
    """Remove the service: running responses are finished first. Other applications stay; without any, Serve ends.

    Raises NotFoundError where there is no such service, ClusterError where it does not go in time.
    """
    details = details_of(settings)
    if name not in details.get("applications", {}):
        raise NotFoundError(
            f"there is no rollout service {name!r}", "`escala rollouts status` shows what there is"
        )
    others = [config for other, config in configs_of(details).items() if other != name]
    call(settings, "PUT", {**how_served(details), "applications": others})
    report(f"{name}: finishing what runs")
    deadline = time.monotonic() + wait_seconds
    while name in (left := details_of(settings).get("applications", {})):
        if time.monotonic() > deadline:
            raise ClusterError(f"{name} is not gone after {wait_seconds:g} s", "`escala rollouts status`")
        time.sleep(POLL_SECONDS)
    if not left:
        call(settings, "DELETE")
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
    args.setdefault("rates", asdict(load_cluster(settings.cluster).rates()))
    config = spec.load_rollouts(args)
    if config.governor is not None:
        check_governor(config.governor, config.scaling.min_replicas, config.scaling.max_replicas)
    overrides = [d for d in application.get("deployments") or [] if d.get("name") != POLICY]
    plain = config.model_dump(mode="json")
    digest = None
    if plain["reward"]:
        digest = preflight.ready({}, plain, settings.home, code)
    copy = user_code.directory(settings.home, digest) if digest else None
    environment = runtime_env(job_variables(settings.gcs_address, gpus=config.replica_gpus > 0, code=copy))
    return {
        "route_prefix": "/",
        **application,
        "name": name,
        "args": plain,
        "runtime_env": application.get("runtime_env") or environment,
        "deployments": [*overrides, {"name": POLICY, "autoscaling_config": config.autoscaling()}],
    }


def read_governor(path: Path) -> GovernorConfig:
    """The governor's file, its gains checked. Raises NotFoundError, SpecError."""
    config: GovernorConfig = spec.validate(GovernorConfig, documents.read_yaml(path), path.name)
    check_governor(config)
    return config


def check_governor(config: GovernorConfig, min_replicas: int = 1, max_replicas: int = 1) -> None:
    """Raise SpecError for rules that cannot hold, and for gains that are not stable."""
    Governor(*rules_of(config, min_replicas, max_replicas, config.min_batch))


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
        found, now = status_of(details_of(settings), name), time.monotonic()
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


def _answer(found: RolloutsStatus, rollouts: RolloutsSettings, path: str) -> dict[str, Any] | None:
    """What the service says of its weight versions, or of what it used; None where it does not answer us."""
    token = rollouts.token.get_secret_value() if rollouts.token else None
    try:
        answer = http_client.request(f"{found.address}/{path}", token=token, timeout_seconds=WEIGHTS_SECONDS)
        said: dict[str, Any] | None = answer.json() if answer.succeeded else None
    except (OSError, ValueError):
        return None
    return said


def _scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    """The bounds in an application's configuration, to be changed in place; None where there are none."""
    for deployment in config.get("deployments") or []:
        if deployment.get("name") == POLICY and deployment.get("autoscaling_config"):
            scaling: dict[str, Any] = deployment["autoscaling_config"]
            return scaling
    return None
