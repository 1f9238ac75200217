"""How the Ray head and the MLflow server are started: one process each, and no more modules than are used."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from ray._private.utils import read_ray_address

from escala import ray_head
from escala.managed import mlflow_command, ray_command
from escala.settings import Settings


def test_the_mlflow_server_takes_its_starters_place() -> None:
    say = "import os; print(os.getpid(), os.environ['SAID'])"
    code = (
        "import sys; from escala.mlflow_server import become; print('first');"
        f"become([sys.executable, '-c', {say!r}], extra_env={{'SAID': 'x'}}, capture_output=False)"
    )
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert started.communicate()[0].split() == ["first", str(started.pid), "x"]


def test_the_dashboards_modules_are_there() -> None:
    """The dashboard does not start with one that Ray does not have."""
    spec = importlib.util.find_spec("ray.dashboard")
    assert spec is not None
    assert spec.origin is not None
    sources = [path.read_text() for path in (Path(spec.origin).parent / "modules").rglob("*.py")]
    found = {
        name for text in sources for name in re.findall(r"^class (\w+)\([^)]*SubprocessModule", text, re.M)
    }
    assert set(ray_head.DASHBOARD_MODULES) < found


def test_the_dashboard_alone_is_started_with_fewer_modules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started, parameters = [], []
    monkeypatch.setattr(
        ray_head.services, "start_ray_process", lambda command, kind, **named: started.append((kind, command))
    )
    monkeypatch.setattr(ray_head, "Node", lambda given, **_: parameters.append(given))
    ray_head.start(7001, 7002, 4, str(tmp_path / "ray"))
    for kind in ("dashboard", "raylet"):
        ray_head.services.start_ray_process([kind], kind, fate_share=True)
    chosen = f"--modules-to-load={','.join(ray_head.DASHBOARD_MODULES)}"
    assert started == [("dashboard", ["dashboard", chosen]), ("raylet", ["raylet"])]
    (given,) = parameters
    assert (given.gcs_server_port, given.dashboard_port, given.num_cpus) == (7001, 7002, 4)
    assert given.no_monitor
    assert read_ray_address(str(tmp_path / "ray")) == "127.0.0.1:7001"  # else drivers may find another head
    assert given.ray_client_server_port is None


def test_the_head_ends_with_a_child_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = [("raylet", SimpleNamespace(returncode=-9))]
    node = Mock(dead_processes=Mock(side_effect=[[], [], dead]))
    waited: list[float] = []
    monkeypatch.setattr(ray_head.time, "sleep", waited.append)
    assert ray_head.wait(node) == "raylet (code -9)"
    assert waited == [ray_head.LOOK_SECONDS] * 2


def test_the_head_imports_no_serve_and_no_pandas() -> None:
    code = "import escala.ray_head, sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"pandas", "fastapi", "ray.serve", "ray.scripts.scripts"}.isdisjoint(ran.stdout.split())


def test_each_is_one_process_of_ours(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, ray_address=None, ESCALA_TRACKING_URI=None)
    for command, module in ((ray_command(settings), "ray_head"), (mlflow_command(settings), "mlflow_server")):
        assert command.arguments[1:3] == ["-m", f"escala.{module}"]
    assert ray_command(settings).environment["RAY_enable_metrics_collection"] == "0"
