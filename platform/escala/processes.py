"""Managed processes of one home: started once, found again by pid and identity, stopped with all they
started.

HOME/run/NAME.json records a process; HOME/run/lock is held while anything starts or stops. Each child carries
two environment variables, the home's ESCALA_CLUSTER_ID and its own ESCALA_PROCESS, which its descendants
inherit. By them the orphans of a killed process are found: a Ray driver, for one, outlives its head and would
go on training. Nothing is ever found by its name. No record is needed for safety: a marked process without
one is an orphan too. The identity is the tick of the kernel's clock since boot at which the process started: the
wall clock and the boot time that follows from it may step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from escala.contract.errors import ClusterError
from escala.contract.files import make_private, private_directory, set_aside, sync
from escala.contract.records import load_record, write_json
from escala.storage.locks import locked

CLUSTER_ID = "ESCALA_CLUSTER_ID"
PROCESS_NAME = "ESCALA_PROCESS"
PROCESS_KEY = "ESCALA_PROCESS_KEY"  # Command.key: a damaged record is made again from the process itself
SAME_START_SECONDS = 60.0  # where the kernel gives a start time by the wall clock only: less than it steps
PRIVATE = ("run", "logs", "jobs", "trials", "data", "mlflow.db", "mlflow-artifacts")  # under HOME
ENDING_SECONDS = 5.0  # of a killed process, until the kernel has closed what it listened on
TAIL_BYTES, TAIL_LINES = 64 * 1024, 15


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
    create_time: float  # Unix seconds, as the wall clock was then
    command: list[str]
    port: int | None
    log: str
    started_at: float
    key: str = ""
    identity: str = ""  # with the pid; empty where the system has none (`_identity`)


class Processes:
    """The managed processes of the home directory `home`."""

    def __init__(self, home: Path) -> None:
        self.run = home / "run"
        self.logs = home / "logs"

    def make_directories(self) -> None:
        """Create HOME, HOME/run and HOME/logs, private to the user. Raises ClusterError where that is not
        possible.
        """
        try:
            private_directory(self.run.parent)
            for directory in (self.run, self.logs):
                directory.mkdir(mode=0o700, exist_ok=True)
            for name in PRIVATE:
                make_private(self.run.parent / name)
        except OSError as error:
            raise ClusterError(
                f"cannot write in {self.run.parent}: {error.strerror or error}",
                "make it writable (and free some space), or set ESCALA_HOME",
            ) from error

    def cluster_id(self) -> str:
        """This home's marker, made at its first use. A damaged one is set aside: the processes know it too."""
        path = self.run / "cluster_id"
        try:
            found = path.read_text(errors="replace")
        except FileNotFoundError:
            found = None
        if found is None or not found.isalnum():
            if found is not None:
                set_aside(path, "it is no cluster's id")
            create_once(path, self._id_of_a_process() or uuid.uuid4().hex)
        return path.read_text()

    def _id_of_a_process(self) -> str | None:
        for path in self.run.glob("*.json"):
            with suppress(OSError, ValueError, psutil.Error):
                record = load_record(Record, path)
                if _same(record, psutil.Process(record.pid)):
                    return psutil.Process(record.pid).environ().get(CLUSTER_ID)
        return None

    def wanted(self) -> bool:
        """Whether they shall run: between `escala up` and `escala down`."""
        return (self.run / "wanted").exists()

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[bool]:
        """Hold HOME/run/lock. Yields False, at once, where another holds it and `wait` is False."""
        with ExitStack() as stack:
            try:
                held = stack.enter_context(locked(self.run / "lock", wait))
            except OSError as error:
                hint = "make it writable (and free some space), or set ESCALA_HOME"
                raise ClusterError(f"cannot write in {self.run}: {error.strerror}", hint) from error
            yield held

    def record(self, name: str) -> Record | None:
        """The record of `name`, alive or not. A damaged one is set aside, and made again where the process
        lives.
        """
        path = self.run / f"{name}.json"
        try:
            return load_record(Record, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            set_aside(path, str(error))
            return self._adopt(name)
        except OSError as error:
            raise ClusterError(
                f"cannot read {path}: {error.strerror}", "make it readable, or set ESCALA_HOME"
            ) from error

    def _adopt(self, name: str) -> Record | None:
        """Record the living process that was started as `name` once more."""
        for process in self.marked(name):
            with suppress(psutil.Error, OSError):
                if os.getsid(process.pid) != process.pid or process.environ().get(PROCESS_KEY) is None:
                    continue  # a child of it
                record = Record(
                    name, process.pid, process.create_time(), process.cmdline(), None,
                    str(self.logs / f"{name}.log"), process.create_time(), process.environ()[PROCESS_KEY],
                    _identity(process.pid),
                )  # fmt: skip
                write_json(self.run / f"{name}.json", record)
                return record
        return None

    def alive(self, name: str) -> psutil.Process | None:
        """The recorded process, where it still runs and is the same one."""
        record = self.record(name)
        if record is None:
            return None
        try:
            process = psutil.Process(record.pid)
            if not _same(record, process):
                return None
            if process.status() != psutil.STATUS_ZOMBIE:
                return process
            with suppress(ChildProcessError):
                os.waitpid(record.pid, os.WNOHANG)  # it was a child of ours
            return None
        except (psutil.NoSuchProcess, ValueError, OverflowError):  # a pid that no process can have
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
        environment |= {CLUSTER_ID: self.cluster_id(), PROCESS_NAME: command.name, PROCESS_KEY: command.key}
        environment["PYTHONIOENCODING"] = "utf-8:backslashreplace"  # whatever a name holds, a log can take it
        log = self.logs / f"{command.name}.log"
        with _private_log(log) as output, _signals_held() as release:
            child = subprocess.Popen(
                command.arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=environment, cwd=self.run, start_new_session=True, preexec_fn=release, umask=0o077,
            )  # fmt: skip
            record = Record(
                command.name, child.pid, psutil.Process(child.pid).create_time(), list(command.arguments),
                next(iter(command.ports), None), str(log), time.time(), command.key, _identity(child.pid),
            )  # fmt: skip
            try:
                write_json(self.run / f"{command.name}.json", record)
            except OSError as error:  # nobody would find it again
                child.kill()
                child.wait()
                raise ClusterError(
                    f"{command.name} cannot be recorded in {self.run}: {error.strerror}", "free some space"
                ) from error
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
        try:
            with (self.logs / f"{name}.log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-TAIL_LINES:])


def _identity(pid: int) -> str:
    """BOOT/TICK: in which boot of the machine, and at which tick after it, the process started; it never
    changes. Empty where the system does not say so (only Linux does).
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return f"{boot}/{int(fields[19])}"  # man 5 proc: starttime, the 22nd; a name may hold blanks and brackets


def _same(record: Record, process: psutil.Process) -> bool:
    if record.identity:
        return _identity(process.pid) == record.identity
    return abs(process.create_time() - record.create_time) < SAME_START_SECONDS


@contextmanager
def _private_log(path: Path) -> Iterator[int]:
    """A log to append to, which only this user reads. Raises ClusterError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ClusterError(f"cannot write {path}: {error.strerror}", "make it writable") from error
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            os.fchmod(descriptor, 0o600)
        yield descriptor
    finally:
        os.close(descriptor)


def create_once(path: Path, content: str) -> None:
    """Write a file that only this user reads, unless another process makes it first: then theirs stays."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(fresh, path)  # unlike a rename, lets the first of two win
    finally:
        fresh.unlink()
    sync(path.parent)


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
    it. A process that has just been killed listens for a moment more, as nobody's: it is waited for.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    while (taken := _listener(port)) is not None:
        if taken.pid is None and time.monotonic() < deadline:
            time.sleep(0.05)
            continue
        raise ClusterError(
            f"port {port}, which {name} needs, is taken by {_who(taken.pid)}",
            f"end that process, or choose another port with {setting}",
        )


def _listener(port: int) -> Any:
    """psutil's record of who listens on a port; None: nobody, or it cannot be seen here."""
    for connection in psutil.net_connections("tcp") if sys.platform == "linux" else ():
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            return connection
    return None


def _who(pid: int | None) -> str:
    if pid is None:
        return "a process of another user"
    try:
        return f"process {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"process {pid}"
