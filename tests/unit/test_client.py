"""The one door: settings are read once in a command; what it answers with has the records' fields, one name each."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import escala
from escala import views
from escala.cli.main import app
from escala.client import Escala
from escala.cluster import ClusterStatus
from escala.contract.records import Progress, RunRecord
from escala.jobs.actions import JobDetails, Watched
from escala.jobs.records import Attempt, HistoryEvent, Job
from escala.rollouts.serve_interface import Deployment, Replica, RolloutsStatus
from escala.settings import Settings
from escala.sweeps.design import Trial
from escala.sweeps.plan import SweepPlan
from escala.views.base import View
from escala.views.cluster import ClusterView
from escala.views.jobs import AttemptView, EventView, JobDetailsView, JobView, ProgressView, WatchedJobView
from escala.views.rollouts import DeploymentView, ReplicaView, RolloutsView
from escala.views.run_records import RunView
from escala.views.sweeps import SweepPlanView, TrialView


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, whose tracker does not answer."""
    monkeypatch.setenv("ESCALA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    return tmp_path / "home"


@pytest.mark.parametrize(
    "words",
    [
        "ps --all --json",
        "jobs show nobody",
        "stop nobody",
        "gc --json",
        "status --json",
        "cost --compute-flops 1e15 --json",
        "submit pretrain --compute-flops 1e15 --dry-run --json",
        "sweep smoke --dry-run --json",
        "laws predict nobody --n-active 1e9 --tokens 1e10",
        "laws plan nobody --compute-flops 1e18",
        "laws calibration --json",
        "propose nobody --target-flops 1e18 --max-flops 1e15",
        "explore nobody --target-flops 1e18 --max-flops 1e15 --budget-flops 1e16",
        "runs show nobody",
        "rollouts status",
    ],
)
def test_a_command_reads_the_settings_once(home: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    made: list[Settings] = []
    construct = Settings.__init__

    def counted(self: Settings, **values: Any) -> None:
        made.append(self)
        construct(self, **values)

    monkeypatch.setattr(Settings, "__init__", counted)
    done = CliRunner().invoke(app, words.split())
    assert len(made) == 1, words
    if words.endswith("--json"):
        assert done.exception is None, done.exception
        json.loads(done.stdout)


def test_settings_that_are_given_are_used(home: Path, tmp_path: Path) -> None:
    other = Settings(home=tmp_path / "other")
    assert Escala(other).settings is other
    assert Escala(other).jobs() == []
    assert (tmp_path / "other").exists()
    assert not home.exists()


def test_the_package_s_public_names() -> None:
    assert escala.Escala is Escala
    assert callable(escala.fit_law)
    assert callable(escala.load_law)
    with pytest.raises(AttributeError, match="no attribute 'submit'"):
        escala.submit  # noqa: B018 - the access is the test


@pytest.mark.parametrize(
    ("record", "view"),
    [
        (Job, JobView),
        (JobDetails, JobDetailsView),
        (Attempt, AttemptView),
        (HistoryEvent, EventView),
        (Progress, ProgressView),
        (Watched, WatchedJobView),
        (RunRecord, RunView),
        (ClusterStatus, ClusterView),
        (Replica, ReplicaView),
        (Deployment, DeploymentView),
        (RolloutsStatus, RolloutsView),
        (Trial, TrialView),
        (SweepPlan, SweepPlanView),
    ],
)
def test_a_view_leaves_no_field_of_its_record_out(record: Any, view: type[View]) -> None:
    assert {field.name for field in fields(record)} <= set(view.model_fields)


def test_every_answer_is_a_view_or_plain_and_documented() -> None:
    for name, method in inspect.getmembers(Escala, inspect.isfunction):
        if not name.startswith("_"):
            assert method.__doc__, name
            answer = inspect.signature(method).return_annotation
            plain = ("None", "str", "Path", "Iterator[str]", "dict[", "list[tuple", "list[Path]", "Cluster")
            assert "View" in answer or answer.startswith(plain), f"{name} -> {answer}"


def test_no_view_has_a_number_without_its_unit_in_two_words() -> None:
    """Money, energy, carbon, time and losses are said with their unit, by one name each."""
    wrong = {"usd", "kwh", "hours", "joules", "gco2e", "seconds", "predicted", "low", "high"}
    for path in Path(views.__file__).parent.glob("*.py"):
        module = __import__(f"escala.views.{path.stem}", fromlist=["x"])
        for name, view in inspect.getmembers(module, inspect.isclass):
            if issubclass(view, BaseModel) and name.endswith("View"):
                assert not wrong & set(view.model_fields), name
