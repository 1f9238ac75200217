"""The embedded cluster of a home, Ray head, MLflow server, reconcile loop and its watchdog, or the existing ones
that are configured.

`up` starts what is missing, `down` stops it, `ensure` restarts what died (the reconcile loop calls it; the loop
itself is restarted by the watchdog, `watchdog.py`).
HOME/run/wanted says that the cluster shall run: `up` writes it, `down` removes it first, so that nothing
restarts what is being stopped. Everything listens on loopback only. What each process is started with stands
in `managed.py`.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from escala.contract.errors import ClusterError
from escala.contract.redaction import hide
from escala.managed import (
    answers,
    mlflow_command,
    prune_sessions,
    ray_command,
    ray_environment,
    ray_token,
    runner_command,
    watchdog_command,
)
from escala.processes import Command, Processes
from escala.report import Report, silent
from escala.settings import Settings
from escala.tracking.pages import find_runs_page

log = logging.getLogger("escala.cluster")
POLL_SECONDS = 0.1
NAMES = ("ray", "mlflow", "runner", "watchdog")
STOPPING_ORDER = ("watchdog", "runner", "ray", "mlflow")
TIGHT_BYTES = 64 * 2**20  # free on the home's disk: with less, anything may fail


@dataclass(frozen=True)
class ProcessStatus:
    """One process of the cluster. `state`: running, dead (was started, and is gone or does not answer),
    suspended (by SIGSTOP), absent, external, unknown (what there is of it cannot be read).
    """

    name: str
    state: str
    pid: int | None
    address: str
    log: str | None


@dataclass(frozen=True)
class ClusterStatus:
    """All processes of the cluster. `notes`: what keeps jobs from moving on, and what to do."""

    processes: tuple[ProcessStatus, ...]
    notes: tuple[str, ...] = ()
    runs_page: str | None = None  # in MLflow, once there are runs

    @property
    def running(self) -> bool:
        """Whether nothing is missing."""
        return all(process.state in ("running", "external") for process in self.processes)


@dataclass(frozen=True)
class Connection:
    """What a client needs: addresses, and the environment that Ray's client libraries read."""

    ray_address: str  # HOST:PORT of the GCS, for ray.init
    dashboard_url: str  # for JobSubmissionClient
    tracking_uri: str
    environment: dict[str, str]  # authentication; empty for an external head, which brings its own


def connection(settings: Settings) -> Connection:
    """How to reach the cluster, embedded or not; starts nothing."""
    environment = {} if settings.ray_address else ray_environment(settings)
    return Connection(settings.gcs_address, settings.ray_dashboard, settings.tracker, environment)


def up(settings: Settings, report: Report = silent) -> ClusterStatus:
    """Start what is missing, and wait until it answers. Safe to repeat, to interrupt, and to call twice at
    once.

    Raises ClusterError: a taken port (named, with its holder), a process that dies or does not answer in time
    (with the end of its log), an external address that does not answer.
    """
    processes = Processes(settings.home)
    processes.make_directories()
    _check_external(settings)
    with processes.lock():
        _want(processes)
        first = [c for c in _commands(settings) if c.name not in ("runner", "watchdog")]
        then = [runner_command(settings), watchdog_command(settings)]
        for together in (first, then):  # Ray and MLflow start side by side; the runner needs both
            _start(processes, together, settings.start_seconds, report)
    return status(settings)


def down(settings: Settings, report: Report = silent) -> None:
    """Stop all that `up` started here, jobs included (the next `up` finds them lost). Nothing else is
    touched.
    """
    processes = Processes(settings.home)
    if not processes.run.exists():
        return
    (processes.run / "wanted").unlink(missing_ok=True)
    left: list[str] = []
    with processes.lock():
        for name in STOPPING_ORDER:
            try:
                if processes.stop(name):
                    report(f"{name}: stopped")
            except (ClusterError, OSError) as error:  # the others are stopped all the same
                left.append(f"{name}: {getattr(error, 'message', error)}")
        if not settings.ray_address:
            prune_sessions(settings)
    if left:
        raise ClusterError("not all could be stopped: " + "; ".join(left), "see `escala status`")


def ensure(settings: Settings) -> list[str]:
    """Restart the managed processes, the runner apart, that died. Returns their names; a few milliseconds
    when all is well.

    Does nothing while another `up`, `down` or `ensure` is at work, or when the cluster shall not run.
    """
    processes = Processes(settings.home)
    commands = [c for c in _commands(settings) if c.name != "runner"]
    if not processes.wanted() or all(_serves(processes, c) for c in commands):
        return []
    with processes.lock(wait=False) as held:
        if not held or not processes.wanted():
            return []
        dead = [c for c in commands if not _serves(processes, c)]
        for command in dead:
            processes.stop(command.name, grace_seconds=1.0)
        _start(processes, dead, settings.start_seconds, lambda line: None)
        return [command.name for command in dead]


def status(settings: Settings) -> ClusterStatus:
    """Each process, and whether it answers. Starts nothing."""
    processes = Processes(settings.home)
    commands = {command.name: command for command in _commands(settings)}
    external = {"ray": settings.ray_address, "mlflow": settings.tracking_uri}
    found = []
    for name in NAMES:
        if address := external.get(name):
            found.append(ProcessStatus(name, "external", None, hide(address), None))
            continue
        try:
            record, state = processes.record(name), _state(processes, commands[name])
        except Exception as error:  # noqa: BLE001 - of one process; it is said, and the others are shown
            log.warning("%s: %s: %s", name, type(error).__name__, error)
            record, state = None, "unknown"
        address = {"ray": settings.gcs_address, "mlflow": settings.tracker}.get(name, "")
        pid = record.pid if record and state in ("running", "suspended") else None
        found.append(ProcessStatus(name, state, pid, address, record.log if record else None))
    why = trouble(settings)
    answers = any(p.name == "mlflow" and p.state in ("running", "external") for p in found)
    runs_page = find_runs_page(settings.tracker, settings.experiment) if answers else None
    return ClusterStatus(tuple(found), () if why is None or not processes.wanted() else (why,), runs_page)


def trouble(settings: Settings) -> str | None:
    """Why no job moves on now, and what to do; None where nothing stands in the way. Milliseconds."""
    processes = Processes(settings.home)
    if not processes.wanted():
        return "the cluster is down, so no job moves on: `escala up` starts it"
    loop = processes.alive("runner")
    if loop is None:
        watched = processes.alive("watchdog") is not None
        then = "it is being started again" if watched else "`escala up` starts it again"
        return f"the reconcile loop is not running, so no job moves on: {then}"
    if loop.status() == psutil.STATUS_STOPPED:
        return f"the reconcile loop is suspended, so no job moves on: `kill -CONT {loop.pid}` lets it go on"
    free = shutil.disk_usage(settings.home).free
    if free < TIGHT_BYTES:
        return (
            f"the disk of {settings.home} has {free / 1e6:.0f} MB left: jobs and their records wait until there "
            "is room; `escala gc --delete` frees checkpoints"
        )
    return None


def _state(processes: Processes, command: Command) -> str:
    process = processes.alive(command.name)
    if process is None:
        return "absent" if processes.record(command.name) is None else "dead"
    if process.status() == psutil.STATUS_STOPPED:
        return "suspended"
    return "running" if _serves(processes, command) and command.ready() else "dead"


def _commands(settings: Settings) -> list[Command]:
    """The processes that this home manages: those that are not configured to be somewhere else."""
    commands = [] if settings.ray_address else [ray_command(settings)]
    commands += [] if settings.tracking_uri else [mlflow_command(settings)]
    return [*commands, runner_command(settings), watchdog_command(settings)]


def _want(processes: Processes) -> None:
    try:
        (processes.run / "wanted").touch()
    except OSError as error:
        raise ClusterError(f"cannot write in {processes.run}: {error.strerror}", "free some space") from error


def _serves(processes: Processes, command: Command) -> bool:
    """Our process lives, and its first port takes connections. Cheap; a slow answer is not a death."""
    if processes.alive(command.name) is None:
        return False
    port = next(iter(command.ports), None)
    if port is None:
        return True
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # a full queue of connections: busy, not dead
        return True
    return True


def _start(processes: Processes, commands: list[Command], limit_seconds: float, report: Report) -> None:
    """Launch those of `commands` that do not live, then wait for all of them."""
    begun = time.monotonic()
    started: Counter[str] = Counter()
    missing = [command for command in commands if not _keep(processes, command)]
    for command in missing:  # all ports before the first launch: a taken one leaves nothing half started
        processes.prepare(command)
    for command in missing:
        report(f"{command.name}: starting")
        processes.launch(command)
        started[command.name] += 1
    waiting = commands
    while waiting:
        waiting = [command for command in waiting if not _is_up(processes, command, started, begun, report)]
        if not waiting:
            return
        if not processes.wanted():
            raise ClusterError("the cluster was stopped while it started", "run `escala up` again")
        if time.monotonic() - begun > limit_seconds:
            names = ", ".join(command.name for command in waiting)
            raise ClusterError(
                f"{names} did not answer within {limit_seconds:.0f} s:\n{processes.tail(waiting[0].name)}",
                "`escala down`, then `escala up`; ESCALA_START_SECONDS allows more time",
            )
        time.sleep(POLL_SECONDS)


def _keep(processes: Processes, command: Command) -> bool:
    """Whether `command` runs already, with these settings. The runner and its watchdog, which lose nothing, are
    restarted to take new ones; for the others that is the user's decision.
    """
    record = processes.record(command.name)
    if record is None or processes.alive(command.name) is None:
        return False
    if record.key == command.key:
        return True
    if command.name in ("runner", "watchdog"):
        processes.stop(command.name)
        return False
    raise ClusterError(
        f"{command.name} runs with other settings ({record.key}) than those of now ({command.key})",
        "`escala down`, then `escala up`; or set them back",
    )


def _is_up(
    processes: Processes, command: Command, started: Counter[str], begun: float, report: Report
) -> bool:
    if processes.alive(command.name) is None:
        if started[command.name] >= command.attempts:
            raise ClusterError(
                f"{command.name} ended while it started:\n{processes.tail(command.name)}",
                f"its whole log is {processes.logs / (command.name + '.log')}",
            )
        # It was about to end when we found it alive; or its start may be tried again.
        report(f"{command.name}: starting{' again' if started[command.name] else ''}")
        processes.launch(command)
        started[command.name] += 1
        return False
    # Asked again after the answer, which may have come from a child that outlives it.
    if not command.ready() or processes.alive(command.name) is None:
        return False
    took = f"up after {time.monotonic() - begun:.1f} s" if started[command.name] else "already up"
    report(f"{command.name}: {took}")
    return True


def _check_external(settings: Settings) -> None:
    """Raises ClusterError that names the configured address that does not answer."""
    if settings.ray_address:
        _connect("ESCALA_RAY_ADDRESS", settings.ray_address, settings.ray_address)
        if not answers(f"{settings.ray_dashboard}/api/version", ray_token(), any_status=True):
            raise ClusterError(
                f"Ray's job server at {settings.ray_dashboard} (ESCALA_RAY_DASHBOARD) does not answer",
                "start that head with its dashboard, or correct ESCALA_RAY_DASHBOARD",
            )
    if settings.tracking_uri:
        parts = urlsplit(settings.tracking_uri)
        if parts.hostname:
            port = parts.port or {"https": 443, "http": 80, "postgresql": 5432}.get(parts.scheme, 443)
            _connect("MLFLOW_TRACKING_URI", f"{parts.hostname}:{port}", settings.tracking_uri)


def _connect(variable: str, host_port: str, shown: str) -> None:
    host, _, port = host_port.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise ClusterError(
            f"{shown} ({variable}) does not answer: {error}", f"start it, or correct or unset {variable}"
        ) from error


__all__ = [
    "ClusterStatus",
    "Connection",
    "ProcessStatus",
    "connection",
    "down",
    "ensure",
    "status",
    "trouble",
    "up",
]
