"""One real local cluster for the whole session: Ray head, MLflow server, reconcile loop, in a home of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import settings as hypothesis_settings

from tests import shards
from tests.small_disk import Disk, mounted

if TYPE_CHECKING:
    from escala.views.jobs import JobDetailsView

T = TypeVar("T")
os.environ.setdefault("OMP_NUM_THREADS", "1")
hypothesis_settings.register_profile("escala", deadline=None)  # a busy machine is no failure
hypothesis_settings.load_profile("escala")
# Ray reads these when it is first imported, which any test may do before one of them connects to the session's head.
os.environ.update(RAY_AUTH_MODE="token", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--shard COMMIT`."""
    parser.addoption(
        "--shard", metavar="COMMIT", help="run the one shard of the long tests that this hash chooses"
    )


@pytest.hookimpl(trylast=True)  # after -m has left out the others
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes the session's cluster down comes last. With --shard: leave out the long tests of other shards."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
    commit = config.getoption("shard")
    if commit:
        kept, said = shards.chosen(items, commit)
        left_out = set(items) - set(kept)
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
        print(said)


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for(condition: Callable[[], T], seconds: float, what: str, every: float = 0.1) -> T:
    """The first true value of `condition`, within a limit."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(every)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 256 KB that a test may fill; skipped where none can be mounted."""
    made = mounted(tmp_path / "disk")
    yield made
    subprocess.run(["umount", "--lazy", str(made.path)], check=True)


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """A home of the session's own, away from ~/.escala, on free ports."""
    directory = Path(tempfile.mkdtemp(prefix="escala-tests-"))
    ray, dashboard, mlflow = free_ports(3)
    os.environ.update(
        ESCALA_HOME=str(directory),
        ESCALA_RAY_PORT=str(ray),
        ESCALA_RAY_DASHBOARD_PORT=str(dashboard),
        ESCALA_MLFLOW_PORT=str(mlflow),
    )
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def reports(home: Path) -> Iterator[list[str]]:
    """The session's cluster, started by two at once; what each of them reported."""
    from escala import Escala
    from escala.managed import ray_directory
    from escala.settings import Settings

    command = [sys.executable, "-c", "from escala import Escala; Escala().up(report=print)"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        said = [process.communicate(timeout=400)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        yield said
    finally:
        for process in both:
            process.kill()
        Escala().down(report=print)
        shutil.rmtree(ray_directory(Settings()).parent)


@pytest.fixture(scope="session")
def cluster(home: Path, reports: list[str]) -> Path:
    """The home of the session's cluster, which is up."""
    return home


@pytest.fixture(scope="session")
def undisturbed(cluster: Path) -> JobDetailsView:
    """A pretraining job that has succeeded at the first attempt: what its twins, which are killed, must come to."""
    from tests import twin
    from tests.faults.victims import ended

    details = ended(twin.submit("undisturbed", retries=0))
    assert details.job.state == "succeeded", details.job.message
    return details


@pytest.fixture(scope="module")
def connected(cluster: Path) -> Iterator[None]:
    """This process is a client of the session's cluster."""
    from escala.cluster import connection
    from escala.runtime_env import source_paths
    from escala.settings import Settings

    with pytest.MonkeyPatch.context() as patch:
        for name, value in connection(Settings()).environment.items():
            patch.setenv(name, value)
        import ray

        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(source_paths())}}
        ray.init(Settings().gcs_address, log_to_driver=False, runtime_env=environment)
        yield
        ray.shutdown()
