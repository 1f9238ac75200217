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
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from escala import watchdog as watchdog_module
from escala.contract.errors import ClusterError
from escala.contract.records import write_json
from escala.processes import Command, Processes
from escala.watchdog import Watchdog

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
        identity = f"{record.identity}0" if record.identity else ""
        reused = replace(record, pid=stranger.pid, create_time=stranger_started - 3600, identity=identity)
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


@pytest.mark.parametrize("seconds", [-3600, -2, 2, 3600])
def test_a_clock_that_steps_makes_no_process_dead(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    record = processes.launch(command())
    before = psutil.boot_time()
    for module in (psutil, psutil._psplatform):
        monkeypatch.setattr(module, "boot_time", lambda: before + seconds)
    assert psutil.Process(record.pid).create_time() == pytest.approx(record.create_time + seconds, abs=1)
    found = processes.alive("one")
    assert found is not None
    assert processes.stop("one")
    assert processes.marked("one") == []


def test_without_an_identity_the_start_time_is_compared_with_tolerance(processes: Processes) -> None:
    record = replace(processes.launch(command()), identity="")
    for seconds, same in ((0, True), (-5, True), (5, True), (3600, False)):
        write_json(processes.run / "one.json", replace(record, create_time=record.create_time + seconds))
        assert (processes.alive("one") is not None) is same


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"pid": "x"}', b'{"name": "one", "pid": 1}', b"\xff"]
)
def test_a_damaged_record_is_made_again_from_the_process(
    processes: Processes, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    launched = processes.launch(replace(command(), key="some settings"))
    (processes.run / "one.json").write_bytes(content)
    found = processes.record("one")
    assert found is not None
    assert (found.pid, found.key, found.identity) == (launched.pid, "some settings", launched.identity)
    assert processes.record("one") == found
    assert len(caplog.records) == 1
    assert processes.stop("one")
    assert not psutil.pid_exists(launched.pid)


def test_a_damaged_record_of_a_dead_process_is_none(processes: Processes) -> None:
    launched = processes.launch(command())
    processes.stop("one")
    for pid in (-5, 0, 2**40):
        write_json(processes.run / "one.json", replace(launched, pid=pid, identity=""))
        assert processes.alive("one") is None
    (processes.run / "one.json").write_text("}")
    assert processes.record("one") is None
    assert not processes.stop("one")


def test_a_lost_cluster_id_is_read_from_a_process(processes: Processes) -> None:
    record = processes.launch(command())
    before = processes.cluster_id()
    for content in (b"", b"\0\0", b"../x"):
        (processes.run / "cluster_id").write_bytes(content)
        assert processes.cluster_id() == before
    assert [p.pid for p in processes.marked("one")] == [record.pid]


def test_what_a_process_writes_is_private(processes: Processes) -> None:
    (processes.logs / "one.log").touch(mode=0o644)
    code = "import os, time; print('é'); open('new', 'w').close(); os.rename('new', 'made'); time.sleep(300)"
    processes.launch(command(arguments=[sys.executable, "-S", "-c", code]))
    wait_for(lambda: (processes.run / "made").exists())
    modes = [p.stat().st_mode & 0o777 for p in (processes.logs / "one.log", processes.run / "made")]
    assert modes == [0o600, 0o600]
    assert [p.stat().st_mode & 0o777 for p in (processes.logs, processes.run)] == [0o700, 0o700]


def test_what_an_earlier_version_left_open_is_made_private(tmp_path: Path) -> None:
    for name in ("jobs", "logs"):
        (tmp_path / name).mkdir(mode=0o755)
    (tmp_path / "mlflow.db").touch(mode=0o644)
    Processes(tmp_path).make_directories()
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("jobs", "logs", "run", "mlflow.db")]
    assert modes == [0o700, 0o700, 0o700, 0o600]


def test_the_tail_of_a_huge_log_is_cheap(processes: Processes) -> None:
    with (processes.logs / "one.log").open("wb") as file:
        file.truncate(2**32)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast \xff line\n")
    assert processes.tail("one").endswith("\nlast \ufffd line")
    assert processes.tail("two") == ""


# The watchdog, with a sleeper for the reconcile loop


def test_a_dead_process_that_is_wanted_is_back_at_once(processes: Processes) -> None:
    watchdog = Watchdog(processes, command())
    assert not watchdog.look()  # nobody wants it
    (processes.run / "wanted").touch()
    assert watchdog.look()
    assert not watchdog.look()
    first = processes.record("one")
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: processes.alive("one") is None)
    wait_for(watchdog.look)
    second = processes.record("one")
    assert second is not None
    assert second.pid != first.pid
    assert not psutil.pid_exists(first.pid)  # no zombie is left of it


def test_it_brings_nothing_back_that_is_being_stopped(processes: Processes) -> None:
    watchdog = Watchdog(processes, command())
    (processes.run / "wanted").touch()
    with processes.lock():  # an `up` or `down` is at work
        assert not watchdog.look()
    (processes.run / "wanted").unlink()
    assert not watchdog.look()
    assert processes.record("one") is None


def test_one_that_ends_at_once_is_started_less_and_less_often(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, starts = 1000.0, []
    monkeypatch.setattr(watchdog_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(processes, "launch", lambda command: starts.append(now) or Mock(pid=1))
    (processes.run / "wanted").touch()
    watchdog = Watchdog(processes, command())
    while now < 1100:
        watchdog.look()
        now += 0.5
    waits = [after - before for before, after in pairwise(starts)]
    assert waits[:6] == [0.5, 1, 2, 4, 8, 16]
    assert max(waits) == 16


def test_the_watchdog_is_small() -> None:
    code = "import escala.watchdog, sys; print(*(m for m in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"pydantic", "sqlalchemy", "ray", "mlflow", "typer"}.isdisjoint(loaded)
