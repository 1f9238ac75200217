"""Managed processes of one home: started once, found again by pid and start time, stopped with all they
started.

HOME/run/NAME.json records a process; HOME/run/lock is held while anything starts or stops. Each child carries
two environment variables, the home's ESCALA_CLUSTER_ID and its own ESCALA_PROCESS, which its descendants
inherit. By them the orphans of a killed process are found: a Ray driver, for one, outlives its head and would
go on training. Nothing is ever found by its name. No record is needed for safety: a marked process without
one is an orphan too.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from escala.errors import ClusterError
from escala.records import read_record, write_json

CLUSTER_ID = "ESCALA_CLUSTER_ID"
PROCESS_NAME = "ESCALA_PROCESS"
SAME_START_SECONDS = 1.0  # a process's start time wobbles by less than this as the kernel's clock is slewed
TAIL_LINES = 15


@dataclass(frozen=True)
class Command:
    """How to start one managed process, and how to tell that it answers."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]  # set on top of ours
    ready: Callable[[], bool]  # polled; a real request, not a guess
    ports: Mapping[int, str] = field(default_factory=dict)  # port -> the setting that changes it
    without: Sequence[str] = ()  # variables of ours that the child must not see
    key: str = ""  # what the process was configured with; recorded
    attempts: int = 1  # a process that dies while it starts is started this often


@dataclass(frozen=True)
class Record:
    """A process that we started: HOME/run/NAME.json."""

    name: str
    pid: int
    create_time: float  # Unix seconds; with the pid, its identity
    command: list[str]
    port: int | None
    log: str
    started_at: float
    key: str = ""


class Processes:
    """The managed processes of the home directory `home`."""

    def __init__(self, home: Path) -> None:
        self.run = home / "run"
        self.logs = home / "logs"

    def make_directories(self) -> None:
        """Create HOME/run and HOME/logs. Raises ClusterError where that is not possible."""
        try:
            self.run.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClusterError(f"cannot write in {self.run.parent}: {error}", "set ESCALA_HOME") from error

    def cluster_id(self) -> str:
        """This home's marker, made at its first use."""
        path = self.run / "cluster_id"
        if not path.exists():
            create_once(path, uuid.uuid4().hex)
        return path.read_text()

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[bool]:
        """Hold HOME/run/lock. Yields False, at once, where another holds it and `wait` is False."""
        descriptor = os.open(self.run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)

    def record(self, name: str) -> Record | None:
        """The record of `name`, alive or not."""
        return read_record(Record, self.run / f"{name}.json")

    def alive(self, name: str) -> psutil.Process | None:
        """The recorded process, where it still runs and is the same one."""
        record = self.record(name)
        if record is None:
            return None
        try:
            process = psutil.Process(record.pid)
            same = abs(process.create_time() - record.create_time) < SAME_START_SECONDS
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None

    def prepare(self, command: Command) -> None:
        """End what an earlier, killed one left behind. Raises ClusterError where a port is taken still."""
        self.end_marked(command.name, grace_seconds=0.0)
        for port, setting in command.ports.items():
            check_port_free(port, setting, command.name)

    def launch(self, command: Command) -> Record:
        """Start `command` (the lock is held): end its orphans, check its ports, record it. Does not wait for
        it.
        """
        self.prepare(command)
        environment = {k: v for k, v in os.environ.items() if k not in command.without} | dict(
            command.environment
        )
        environment |= {CLUSTER_ID: self.cluster_id(), PROCESS_NAME: command.name}
        log = self.logs / f"{command.name}.log"
        with log.open("ab") as output, _signals_held() as release:
            child = subprocess.Popen(
                command.arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=environment, cwd=self.run, start_new_session=True, preexec_fn=release,
            )  # fmt: skip
            record = Record(
                command.name, child.pid, psutil.Process(child.pid).create_time(), list(command.arguments),
                next(iter(command.ports), None), str(log), time.time(), command.key,
            )  # fmt: skip
            write_json(self.run / f"{command.name}.json", record)
        return record

    def stop(self, name: str, grace_seconds: float = 10.0) -> bool:
        """End the recorded process and all that carry its mark (the lock is held). True if any ran."""
        process = self.alive(name)
        if process is not None:
            self._terminate([process], grace_seconds)
        ended = self.end_marked(name, grace_seconds)
        (self.run / f"{name}.json").unlink(missing_ok=True)
        return process is not None or ended > 0

    def marked(self, name: str) -> list[psutil.Process]:
        """Every process that this home's `name` started, directly or not; never ourselves or our parents."""
        wanted = self.cluster_id()
        mine = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ() if process.pid not in mine else {}
            except (psutil.Error, OSError):  # another user's, or just gone
                continue
            if environment.get(CLUSTER_ID) == wanted and environment.get(PROCESS_NAME) == name:
                found.append(process)
        return found

    def end_marked(self, name: str, grace_seconds: float) -> int:
        """End what carries the mark of `name`; repeated, since they may fork meanwhile. Returns how many."""
        ended = 0
        for _ in range(10):
            left = self.marked(name)
            if not left:
                return ended
            self._terminate(left, grace_seconds)
            ended += len(left)
        raise ClusterError(f"processes of {name} will not end: {[p.pid for p in left]}", "end them by hand")

    @staticmethod
    def _terminate(processes: list[psutil.Process], grace_seconds: float) -> None:
        left = processes
        if grace_seconds > 0:
            _signal(left, signal.SIGTERM)
            _, left = psutil.wait_procs(left, timeout=grace_seconds)
        _signal(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=10)

    def tail(self, name: str) -> str:
        """The last lines of the process's log."""
        path = self.logs / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-TAIL_LINES:])


def create_once(path: Path, content: str) -> None:
    """Write a file that only this user reads, unless another process makes it first: then theirs stays."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
    with suppress(FileExistsError):
        os.link(fresh, path)  # unlike a rename, lets the first of two win
    fresh.unlink()


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)  # psutil checks the start time first
        except psutil.NoSuchProcess:
            continue


@contextmanager
def _signals_held() -> Iterator[Callable[[], None]]:
    """Hold back Ctrl-C and friends, so that a child is never left without its record. Yields the child's
    undoing: a blocked signal stays blocked across exec, and a child that ignores SIGTERM could not be
    stopped.
    """
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield lambda: (signal.pthread_sigmask(signal.SIG_SETMASK, before), None)[1]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_port_free(port: int, setting: str, name: str) -> None:
    """Raises ClusterError that names who listens on `port` (where we may see it) and the setting that changes
    it.
    """
    for connection in psutil.net_connections("tcp") if sys.platform == "linux" else ():
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            raise ClusterError(
                f"port {port}, which {name} needs, is taken by {_who(connection.pid)}",
                f"end that process, or choose another port with {setting}",
            )


def _who(pid: int | None) -> str:
    if pid is None:
        return "a process of another user"
    try:
        return f"process {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"process {pid}"
