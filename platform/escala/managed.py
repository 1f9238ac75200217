"""What the managed processes are started with: Ray head, MLflow server, reconcile loop, its watchdog. Why each
option, beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from escala import http_client
from escala.contract.errors import ClusterError
from escala.contract.files import set_aside
from escala.processes import Command, Processes, create_once
from escala.settings import Settings
from escala.watchdog import RUNNER, RUNNER_ARGUMENTS

ANSWER_SECONDS = 5.0


def ray_environment(settings: Settings) -> dict[str, str]:
    """What every process that talks to the embedded head needs, clients too."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path(settings)),
        # Despite its name: without it Ray replaces 127.0.0.1 by the outward address and listens there.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def ray_command(settings: Settings) -> Command:
    """The head (`escala.ray_head`, which says what runs in it)."""
    (dashboard_metrics,) = _free_ports(1)
    arguments = [
        sys.executable, "-m", "escala.ray_head",
        "--port", str(settings.ray_port), "--dashboard-port", str(settings.ray_dashboard_port),
        "--num-cpus", str(settings.num_cpus), "--directory", str(ray_directory(settings)),
    ]  # fmt: skip
    environment = ray_environment(settings) | {
        # Workers write their title over their environment, and our mark with it, unless told not to.
        "SPT_NOENV": "1",
        # Ray's default of 15 lets anything else on the machine go before a training step.
        "RAY_worker_niceness": "0",
        # One node has none to hand its work to. Ray would wait 30 s for that, and be killed before it has ended what
        # it started.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "DASHBOARD_METRIC_PORT": str(dashboard_metrics),
        # What an idle head need not do (benchmarks/idle.py); private to Ray 2.60:
        "RAY_enable_metrics_collection": "0",  # for Prometheus: each process would send some every 10 s
        "METRICS_RECORD_INTERVAL_S": "3600",  # the dashboard's own: it read memory maps every 5 s
        "RAY_prestart_worker_first_driver": "0",  # for the job server's own driver, which uses none
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # look for new log files twice a second, not ten times
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    ports = {settings.ray_port: "ESCALA_RAY_PORT", settings.ray_dashboard_port: "ESCALA_RAY_DASHBOARD_PORT"}
    key = f"port {settings.ray_port}, dashboard {settings.ray_dashboard_port}, {settings.num_cpus} CPUs"
    without = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "ESCALA_RAY_ADDRESS")
    return Command(
        "ray", arguments, environment, lambda: ray_nodes_alive(settings) > 0, ports, without, key,
        attempts=3,  # Ray gives up when its raylet takes more than 30 s, as on a busy machine it may
    )  # fmt: skip


def mlflow_command(settings: Settings) -> Command:
    """The MLflow server (`escala.mlflow_server`), on SQLite. One worker (280 MB) is enough: metrics come in batches."""
    port, home = settings.mlflow_port, settings.home
    arguments = [
        sys.executable, "-m", "escala.mlflow_server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", "sqlite:///../mlflow.db",  # from HOME/run, where it is started: an
        # absolute path with ?, # or % would be cut or decoded on its way through MLflow's URL
        "--artifacts-destination", (home / "mlflow-artifacts").as_uri(), "--serve-artifacts",
    ]  # fmt: skip
    environment = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # three more processes, for features that we don't use
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    ready_at = f"http://127.0.0.1:{port}/health"
    ports, without = {port: "ESCALA_MLFLOW_PORT"}, ("MLFLOW_TRACKING_URI",)
    return Command(
        "mlflow", arguments, environment, lambda: answers(ready_at), ports, without, f"port {port}"
    )


def runner_command(settings: Settings) -> Command:
    """The reconcile loop. It is ready when it holds its lock, HOME/run/runner.lock, and has written its pid
    there.
    """
    environment = settings.environment() | ({} if settings.ray_address else ray_environment(settings))
    lock = settings.home / "run" / "runner.lock"

    def ready() -> bool:
        record = Processes(settings.home).record("runner")
        return record is not None and lock.exists() and lock.read_bytes().strip() == b"%d" % record.pid

    return Command(RUNNER, RUNNER_ARGUMENTS, environment, ready, key=_settings_key(settings))


def watchdog_command(settings: Settings) -> Command:
    """The reconcile loop's watchdog, with the environment and the key that it starts the loop with."""
    loop = runner_command(settings)
    arguments = [sys.executable, "-m", "escala.watchdog"]
    return Command("watchdog", arguments, loop.environment, lambda: True, key=loop.key)


def _settings_key(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(settings.environment(), sort_keys=True).encode()).hexdigest()[:16]


def token_path(settings: Settings) -> Path:
    """The embedded head's token, made at its first use, readable by this user only."""
    path = settings.home / "run" / "ray_token"
    if path.is_file() and not path.read_bytes().strip():
        set_aside(path, "it is empty")
    if not path.exists():
        Processes(settings.home).make_directories()
        create_once(path, secrets.token_hex(32))
    return path


def head_token(settings: Settings) -> str | None:
    """The token of the head, embedded or not; None where it has none."""
    return token_path(settings).read_text() if settings.ray_address is None else ray_token()


def ray_token() -> str | None:
    """The token for an external head, from where Ray's own clients read it; None where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return path.read_text().strip() if path.is_file() else None


def ray_directory(settings: Settings) -> Path:
    """Ray's sessions: its logs and sockets. A short name in the system's temporary directory, since a Unix
    socket's path may have 107 bytes, of which Ray takes 64; ours alone, since others may write in that
    directory.
    """
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) > 12:
        base = Path("/tmp")
    digest = hashlib.sha256(os.fsencode(settings.home)).hexdigest()[:10]
    path = base / f"escala-{os.getuid()}-{digest}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ClusterError(
            f"{path}, which Ray's sockets need, belongs to somebody else", "remove it, or set TMPDIR"
        )
    return path / "ray"  # Ray opens its own directory to everybody, but not the one above


def prune_sessions(settings: Settings, keep: int = 3) -> None:
    """Remove what Ray left of all but the last few of the embedded head's sessions; no head may run."""
    for session in sorted(ray_directory(settings).glob("session_2*"))[:-keep]:
        shutil.rmtree(session, ignore_errors=True)


def ray_nodes_alive(settings: Settings) -> int:
    """How many nodes of the cluster live, by its dashboard; 0 where that does not answer (yet)."""
    token = head_token(settings)
    found = _get(f"{settings.ray_dashboard}/nodes?view=summary", token)
    if found is None or not found.succeeded or not answers(f"{settings.ray_dashboard}/api/jobs/", token):
        return 0
    try:
        nodes: list[dict[str, Any]] = found.json()["data"]["summary"]
        return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in nodes)
    except (ValueError, LookupError, TypeError, AttributeError):  # no head's answer: somebody else's port
        return 0


def answers(url: str, token: str | None = None, any_status: bool = False) -> bool:
    """Whether `url` answers with success, or at all where `any_status`."""
    found = _get(url, token)
    return found is not None and (any_status or found.succeeded)


def _get(url: str, token: str | None) -> http_client.HttpResponse | None:
    """None: no answer."""
    try:
        return http_client.request(url, token=token, timeout_seconds=ANSWER_SECONDS)
    except OSError:
        return None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
