"""The session's cluster itself: started by two at once, refused, killed in part, and at the session's end stopped.

Its head is killed in tests/faults/test_faults.py, under a job.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from escala import cluster
from escala.contract.errors import ClusterError
from escala.managed import ray_directory, token_path
from escala.processes import PRIVATE, Processes
from escala.settings import Settings
from tests.conftest import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def running(cluster: Path) -> Settings:
    """Those of the session's cluster, which is up."""
    return Settings()


def test_two_at_once_start_one(reports: list[str]) -> None:
    assert sorted("ray: starting" in text for text in reports) == [False, True]  # one started, one found


def pids(status: cluster.ClusterStatus) -> dict[str, int | None]:
    return {process.name: process.pid for process in status.processes}


def ours(settings: Settings) -> list[psutil.Process]:
    return [p for name in cluster.NAMES for p in Processes(settings.home).marked(name)]


def test_up_is_idempotent_and_cheap_to_ensure(running: Settings) -> None:
    before = cluster.status(running)
    assert before.running, before
    assert pids(cluster.up(running)) == pids(before)
    seconds = []
    for _ in range(5):  # the best of five: the bound is on the work, not on a busy machine
        begun = time.monotonic()
        assert cluster.ensure(running) == []
        seconds.append(time.monotonic() - begun)
    assert min(seconds) < 0.2  # 6 ms when the machine is idle


def listens(process: psutil.Process) -> list[str]:
    """The addresses that it listens on; none where it has just ended, as an idle worker may."""
    try:
        return [c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN"]
    except psutil.NoSuchProcess:
        return []


def test_everything_listens_on_loopback(running: Settings) -> None:
    listening = [ip for process in ours(running) for ip in listens(process)]
    assert len(listening) >= 8
    addresses = [ipaddress.ip_address(ip) for ip in listening]
    assert all((getattr(a, "ipv4_mapped", None) or a).is_loopback for a in addresses), listening


def test_the_token_is_asked_for_and_private(running: Settings) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{running.ray_dashboard}/api/jobs/", timeout=10)
    assert token_path(running).stat().st_mode & 0o777 == 0o600


def test_a_taken_port_is_named(running: Settings, tmp_path: Path) -> None:
    other = running.model_copy(update={"home": tmp_path})
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


def mode(path: Path) -> int:
    """The permissions of a path; none where it has just been removed, as a file of the spool may be."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return 0


def test_home_and_logs_are_private(running: Settings) -> None:
    """What `up` makes; what jobs write is behind the modes of these."""
    made = [running.home / name for name in (*PRIVATE, "escala.db")]
    paths = [running.home, *made, *(running.home / "logs").rglob("*")]
    assert running.home / "run" in paths
    assert running.home / "logs" / "runner.log" in paths
    assert [path for path in paths if not path.is_symlink() and mode(path) & 0o077] == []


@pytest.mark.last
def test_a_loop_that_is_being_stopped_is_not_brought_back(running: Settings) -> None:
    """`down` kills it while its watchdog looks on."""
    cluster.down(running)
    time.sleep(2.5)  # two looks of a watchdog, were there one
    assert ours(running) == []


@pytest.mark.last
def test_down_leaves_nothing(running: Settings) -> None:
    cluster.down(running)
    assert ours(running) == []
    assert {p.state for p in cluster.status(running).processes} == {"absent"}
    assert cluster.ensure(running) == []
    cluster.down(running)
