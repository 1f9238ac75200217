"""Settings: defaults, variables, what is refused and how it is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from escala.contract.errors import SpecError
from escala.settings import Settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "RAY_ADDRESS",
        "RAY_DASHBOARD",
        "TRACKING_URI",
        "RAY_PORT",
        "RAY_DASHBOARD_PORT",
        "MLFLOW_PORT",
    ):
        monkeypatch.delenv(f"ESCALA_{name}", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ESCALA_HOME", str(tmp_path))


def test_embedded_by_default(tmp_path: Path) -> None:
    settings = Settings()
    assert settings.database_url == f"sqlite:///{tmp_path}/escala.db"
    assert settings.ray_address is None
    assert settings.gcs_address == "127.0.0.1:6399"
    assert settings.ray_dashboard == "http://127.0.0.1:8299"
    assert settings.tracker == "http://127.0.0.1:5099"
    assert settings.max_running_jobs == 2


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().mlflow_port = 6000


def test_external_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCALA_RAY_ADDRESS", "head.example:6379")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker.example")
    settings = Settings()
    assert settings.gcs_address == "head.example:6379"
    assert settings.ray_dashboard == "http://head.example:8265"
    assert settings.tracker == "http://tracker.example"


def test_our_variable_goes_before_mlflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCALA_TRACKING_URI", "http://ours")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://theirs")
    assert Settings().tracker == "http://ours"


def test_an_empty_home_is_not_the_present_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCALA_HOME", "")
    assert Settings().home == Path("~/.escala").expanduser()


def test_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCALA_RAY_ADDRESS", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert (Settings().ray_address, Settings().tracking_uri) == (None, None)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ESCALA_RAY_PORT", "80", "ESCALA_RAY_PORT"),
        ("ESCALA_MAX_RUNNING_JOBS", "none", "ESCALA_MAX_RUNNING_JOBS"),
        ("ESCALA_RAY_ADDRESS", "ray://head", "HOST:PORT"),
        ("ESCALA_MLFLOW_PORT", "6399", "must differ"),
    ],
)
def test_a_bad_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=said):
        Settings()


def test_a_child_reads_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESCALA_MAX_RUNNING_JOBS", "7")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker.example")
    settings = Settings()
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Settings() == settings == Settings()


def test_import_is_light() -> None:
    code = "import sys, escala.settings, escala.cluster; print({'ray', 'torch', 'mlflow'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("ESCALA_START_SECONDS", "inf"), ("ESCALA_START_SECONDS", "nan"), ("ESCALA_NUM_CPUS", "1000000000")],
)
def test_a_number_that_no_machine_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=name):
        Settings()


def test_a_cluster_s_file_is_found_from_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reconcile loop has another working directory than the shell."""
    monkeypatch.chdir(tmp_path)
    assert Settings().cluster == "local"
    monkeypatch.setenv("ESCALA_CLUSTER", "mine.yaml")
    settings = Settings()
    assert settings.cluster == str(tmp_path / "mine.yaml")
    assert settings.environment()["ESCALA_CLUSTER"] == settings.cluster
