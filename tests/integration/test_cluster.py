"""The embedded cluster for real, in a home and on ports of its own: started, refused, killed, stopped."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from escala import cluster
from escala.contract.errors import ClusterError
from escala.managed import ray_directory, token_path
from escala.processes import Processes
from escala.settings import Settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    sockets = [socket.socket() for _ in range(3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ray, dashboard, mlflow = (one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    home = tmp_path_factory.mktemp("home")
    ports = {"ray_port": ray, "ray_dashboard_port": dashboard, "mlflow_port": mlflow}
    embedded = {"ray_address": None, "ESCALA_TRACKING_URI": None}
    return Settings(home=home, database_url=f"sqlite:///{home}/escala.db", **ports, **embedded)


@pytest.fixture(scope="module")
def running(settings: Settings) -> Iterator[Settings]:
    """Up, by two at once."""
    code = "from escala import cluster, settings; cluster.up(settings.Settings(), print)"
    environment = os.environ | settings.environment()
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        said = [process.communicate()[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert sorted("ray: starting" in text for text in said) == [False, True]  # one started, one found
        yield settings
    finally:
        cluster.down(settings)
        shutil.rmtree(ray_directory(settings).parent)


def pids(status: cluster.ClusterStatus) -> dict[str, int | None]:
    return {process.name: process.pid for process in status.processes}


def ours(settings: Settings) -> list[psutil.Process]:
    return [p for name in cluster.NAMES for p in Processes(settings.home).marked(name)]


def test_up_is_idempotent_and_cheap_to_ensure(running: Settings) -> None:
    before = cluster.status(running)
    assert before.running, before
    assert pids(cluster.up(running)) == pids(before)
    begun = time.monotonic()
    assert cluster.ensure(running) == []
    assert time.monotonic() - begun < 0.2  # 6 ms when the machine is idle


def test_everything_listens_on_loopback(running: Settings) -> None:
    listening = [c.laddr.ip for p in ours(running) for c in p.net_connections("tcp") if c.status == "LISTEN"]
    assert len(listening) >= 8
    addresses = [ipaddress.ip_address(ip) for ip in listening]
    assert all((getattr(a, "ipv4_mapped", None) or a).is_loopback for a in addresses), listening


def test_the_token_is_asked_for_and_private(running: Settings) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{running.ray_dashboard}/api/jobs/", timeout=10)
    assert token_path(running).stat().st_mode & 0o777 == 0o600


def test_a_taken_port_is_named(running: Settings, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = running.model_copy(update={"home": tmp_path_factory.mktemp("other")})
    with pytest.raises(ClusterError) as caught:
        cluster.up(other)
    assert f"port {running.ray_port}" in caught.value.message
    assert "gcs_server" in caught.value.message
    assert "ESCALA_RAY_PORT" in caught.value.hint
    assert {p.state for p in cluster.status(other).processes} == {"absent"}
    ray_directory(other).parent.rmdir()


def test_an_external_address_that_does_not_answer_is_named(running: Settings) -> None:
    away = running.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:9 \(MLFLOW_TRACKING_URI\) does not answer"):
        cluster.up(away)


def submit(settings: Settings, command: str) -> None:
    headers = {
        "Authorization": f"Bearer {token_path(settings).read_text()}",
        "Content-Type": "application/json",
    }
    body = json.dumps({"entrypoint": command}).encode()
    request = urllib.request.Request(f"{settings.ray_dashboard}/api/jobs/", body, headers)
    urllib.request.urlopen(request, timeout=60).close()


def test_a_killed_head_comes_back_and_leaves_no_orphan(running: Settings) -> None:
    marker = running.home / "driver"
    code = f"import os, pathlib, time; pathlib.Path('{marker}').write_text(str(os.getpid())); time.sleep(900)"
    submit(running, f'{sys.executable} -S -c "{code}"')
    wait_for(lambda: marker.exists() and marker.read_text(), 60, "the driver")
    driver = psutil.Process(int(marker.read_text()))
    before = ours(running)
    assert driver in before
    killed = pids(cluster.status(running))["ray"]
    assert killed
    others = {
        p.pid for name in ("mlflow", "runner", "watchdog") for p in Processes(running.home).marked(name)
    }
    os.kill(killed, signal.SIGKILL)

    def back() -> bool:
        cluster.ensure(running)  # or the reconcile loop was first
        now = cluster.status(running)
        return now.running and pids(now)["ray"] != killed

    wait_for(back, 120, "a new head")
    left = [
        p for p in before if p.pid not in others and p.is_running() and p.status() != psutil.STATUS_ZOMBIE
    ]
    assert left == []


def test_a_killed_tracker_comes_back(running: Settings) -> None:
    before = pids(cluster.status(running))
    assert before["mlflow"]
    os.kill(before["mlflow"], signal.SIGKILL)
    wait_for(lambda: Processes(running.home).alive("mlflow") is None, 20, "the end of the tracker")
    after = pids(cluster.up(running))
    assert after["mlflow"] not in (None, before["mlflow"])
    assert after["ray"] == before["ray"]


@pytest.mark.parametrize("name", ["runner", "watchdog"])
def test_each_of_loop_and_watchdog_brings_the_other_back(running: Settings, name: str) -> None:
    processes, before = Processes(running.home), pids(cluster.status(running))
    killed = before[name]
    assert killed
    begun = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    wait_for(
        lambda: processes.alive(name) is None or pids_of(processes, name) != killed, 20, f"the end of {name}"
    )
    said = cluster.trouble(running)
    assert said is None or "the reconcile loop is not running" in said
    wait_for(lambda: pids(cluster.status(running))[name] not in (None, killed), 30, f"another {name}")
    print(f"{name}: back after {time.monotonic() - begun:.1f} s")
    after = pids(cluster.status(running))
    assert {n: after[n] for n in ("ray", "mlflow")} == {n: before[n] for n in ("ray", "mlflow")}
    assert cluster.trouble(running) is None


def pids_of(processes: Processes, name: str) -> int | None:
    record = processes.record(name)
    return record.pid if record else None


def test_damaged_records_end_nothing(running: Settings) -> None:
    before = pids(cluster.status(running))
    for name in cluster.NAMES:
        (running.home / "run" / f"{name}.json").write_text("{")
    assert pids(cluster.status(running)) == before
    assert cluster.ensure(running) == []


def test_home_and_logs_are_private(running: Settings) -> None:
    run = running.home / "run"  # what is in it is behind its own mode
    paths = [
        running.home,
        *(p for p in running.home.rglob("*") if not p.is_symlink() and run not in p.parents),
    ]
    assert run in paths
    assert running.home / "logs" / "runner.log" in paths
    assert [path for path in paths if path.stat().st_mode & 0o077] == []


def test_a_loop_that_is_being_stopped_is_not_brought_back(running: Settings) -> None:
    """`down` kills it while its watchdog looks on."""
    cluster.down(running)
    time.sleep(2.5)  # two looks of a watchdog, were there one
    assert ours(running) == []


def test_down_leaves_nothing(running: Settings) -> None:
    cluster.down(running)
    assert ours(running) == []
    assert {p.state for p in cluster.status(running).processes} == {"absent"}
    assert cluster.ensure(running) == []
    cluster.down(running)
