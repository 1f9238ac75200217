"""Managed processes: identity, orphans, ports, interruption; with small real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from escala.errors import ClusterError
from escala.processes import Command, Processes
from escala.records import write_json

SLEEPER = [sys.executable, "-S", "-c", "import time; time.sleep(300)"]
# A parent that starts a child of a session of its own, as Ray's job drivers are, and says so.
FAMILY = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"], start_new_session=True)
pathlib.Path("child").write_text(str(child.pid))
time.sleep(300)
"""


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    found.make_directories()
    yield found
    for name in ("one", "two"):
        found.stop(name, grace_seconds=0)


def command(
    name: str = "one", arguments: list[str] = SLEEPER, ports: dict[int, str] | None = None
) -> Command:
    return Command(name, arguments, {}, lambda: True, ports or {})


def test_start_find_stop(processes: Processes) -> None:
    record = processes.launch(command())
    found = processes.alive("one")
    assert found is not None
    assert found.pid == record.pid
    assert os.getsid(record.pid) == record.pid  # a session of its own: our Ctrl-C does not reach it
    assert processes.stop("one")
    assert not psutil.pid_exists(record.pid) or psutil.Process(record.pid).status() == psutil.STATUS_ZOMBIE
    assert processes.record("one") is None
    assert not processes.stop("one")


def test_a_recycled_pid_is_not_ours(processes: Processes) -> None:
    stranger = subprocess.Popen(SLEEPER)
    try:
        record = processes.launch(command())
        stranger_started = psutil.Process(stranger.pid).create_time()
        processes.stop("one")
        reused = replace(record, pid=stranger.pid, create_time=stranger_started - 60)
        write_json(processes.run / "one.json", reused)
        assert processes.alive("one") is None
        assert not processes.stop("one")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_orphans_of_a_killed_process_end_before_the_next_start(processes: Processes) -> None:
    record = processes.launch(command(arguments=[sys.executable, "-S", "-c", textwrap.dedent(FAMILY)]))
    written = processes.run / "child"
    wait_for(lambda: written.exists() and written.read_text())
    child = psutil.Process(int(written.read_text()))
    os.kill(record.pid, signal.SIGKILL)
    wait_for(lambda: processes.alive("one") is None)
    assert [p.pid for p in processes.marked("one")] == [child.pid]
    again = processes.launch(command())
    wait_for(lambda: not child.is_running())
    assert [p.pid for p in processes.marked("one")] == [again.pid]


def test_only_its_own_name_and_home(processes: Processes, tmp_path: Path) -> None:
    processes.launch(command("one"))
    two = processes.launch(command("two"))
    other = Processes(tmp_path / "other")
    other.make_directories()
    assert other.marked("one") == []
    processes.stop("one")
    assert [p.pid for p in processes.marked("two")] == [two.pid]


def test_a_process_that_ignores_sigterm_is_killed(processes: Processes) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); open('deaf', 'w'); time.sleep(300)"
    record = processes.launch(command(arguments=[sys.executable, "-S", "-c", code]))
    wait_for(lambda: (processes.run / "deaf").exists())
    processes.stop("one", grace_seconds=0.1)
    wait_for(lambda: processes.alive("one") is None)
    assert processes.marked("one") == []
    assert record.pid > 0


def test_a_taken_port_is_named_with_its_holder_and_setting(processes: Processes) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError) as caught:
            processes.launch(command(ports={port: "ESCALA_SOME_PORT"}))
    assert f"port {port}" in caught.value.message
    assert f"process {os.getpid()} " in caught.value.message
    assert "ESCALA_SOME_PORT" in caught.value.hint
    assert processes.record("one") is None


def test_the_child_does_not_inherit_held_signals(processes: Processes) -> None:
    record = processes.launch(command())
    mask = next(
        line for line in Path(f"/proc/{record.pid}/status").read_text().splitlines() if "SigBlk" in line
    )
    assert int(mask.split()[1], 16) & (1 << (signal.SIGTERM - 1)) == 0


def test_the_lock_excludes(processes: Processes) -> None:
    with processes.lock() as first, processes.lock(wait=False) as second:
        assert (first, second) == (True, False)
    with processes.lock(wait=False) as third:
        assert third


def test_one_cluster_id(processes: Processes) -> None:
    assert processes.cluster_id() == Processes(processes.run.parent).cluster_id()


def test_a_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="cannot write"):
        Processes(tmp_path / "file").make_directories()
