"""A submission is answered by the job's id, whatever becomes of the cluster; or nothing is queued."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from escala import Escala
from escala.contract.errors import ClusterError, SpecError, StateError
from escala.jobs.state import StopRequested
from escala.jobs.store import JobStore
from escala.settings import Settings
from tests.conftest import free_ports

SMALL = ["model.n_layers=1", "training.steps=3"]


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a cluster."""
    monkeypatch.setenv("ESCALA_HOME", str(tmp_path))
    for name in ("ESCALA_DATABASE_URL", "ESCALA_RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, port in zip(("RAY_PORT", "RAY_DASHBOARD_PORT", "MLFLOW_PORT"), free_ports(3), strict=True):
        monkeypatch.setenv(f"ESCALA_{name}", str(port))
    return tmp_path


@pytest.fixture
def taken_port(own_home: Path) -> Iterator[int]:
    """Ray's port, where something else listens."""
    with socket.create_server(("127.0.0.1", int(os.environ["ESCALA_RAY_PORT"]))) as server:
        yield server.getsockname()[1]


def queued() -> list[str]:
    store = JobStore(Settings().database_url)
    try:
        return [job.id for job in store.list()]
    finally:
        store.close()


def escala(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "escala.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "words",
    [
        ("submit", "pretrain", "--set", "model.n_layers=1", "--idempotency-key", "one", "--json"),
        ("sweep", "smoke", "--idempotency-key", "one"),
    ],
)
def test_with_a_taken_port_the_answer_is_the_job_and_a_warning_says_why(
    taken_port: int, words: tuple[str, ...]
) -> None:
    for _ in range(2):  # a repeated try is the same job
        done = escala(*words)
        assert done.returncode == 0, done.stderr
        (job_id,) = queued()
        said = json.loads(done.stdout)["id"] if "--json" in words else done.stdout.split()[0]
        assert said == job_id
        assert f"warning: job {job_id} is queued, but the cluster cannot be brought up" in done.stderr
        assert str(taken_port) in done.stderr
        assert "escala up" in done.stderr
        assert "Traceback" not in done.stderr


def test_what_cannot_be_followed_names_the_job_and_says_so(taken_port: int) -> None:
    done = escala("submit", "pretrain", "--set", "model.n_layers=1", "--follow")
    (job_id,) = queued()
    assert done.stdout.split()[0] == job_id
    assert done.returncode == ClusterError.exit_code
    assert f"job {job_id} is queued, and cannot be followed" in done.stderr


@pytest.fixture
def no_cluster(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up` fails."""
    from escala import cluster

    def up(*_: object) -> None:
        raise ClusterError("ray did not answer", "look at its log")

    monkeypatch.setattr(cluster, "up", up)


def test_every_way_to_queue_a_job_warns_and_returns_it(
    no_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(job_id: str) -> None:
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("escala.jobs", logging.WARNING)
        for part in (job_id, "ray did not answer", "look at its log", "`escala up`"):
            assert part in record.getMessage()
        caplog.clear()

    job = Escala().submit("pretrain", overrides=SMALL, options={"name": "first"})
    warned(job.id)
    warned(Escala().sweep("smoke").id)
    warned(Escala().bench_device().id)
    store = JobStore(Settings().database_url)
    store.apply(store.get(job.id), StopRequested())
    store.close()
    assert Escala().retry(job.id).state == "queued"
    warned(job.id)
    assert len(queued()) == 3
    with pytest.raises(ClusterError, match=f"{job.id} is queued, and cannot be followed"):
        next(Escala().watch(job.id))


def test_an_interrupted_start_of_the_cluster_says_the_id_too(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from escala import cluster

    def up(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "up", up)
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        Escala().submit("pretrain", overrides=SMALL, report=told.append)
    (job_id,) = queued()
    assert told == [f"job {job_id} is queued"]
    assert job_id in caplog.text


def test_a_key_is_checked_and_works_for_sweeps_and_specs(no_cluster: None) -> None:
    first = Escala().sweep("smoke", options={"idempotency_key": "k"})
    assert Escala().sweep("smoke", options={"idempotency_key": "k"}).id == first.id
    with pytest.raises(SpecError, match=rf"'k' has queued job {first.id}"):
        Escala().submit("pretrain", overrides=SMALL, options={"idempotency_key": "k"})
    for wrong in ("", "x" * 201, "a\nb", "a\0b"):
        with pytest.raises(SpecError, match="idempotency_key"):
            Escala().submit("pretrain", overrides=SMALL, options={"idempotency_key": wrong})
    with pytest.raises(SpecError, match="--resume"):
        Escala().sweep("smoke", options={"idempotency_key": "k"}, resume=True)
    assert queued() == [first.id]


def test_a_job_that_has_ended_starts_no_cluster(no_cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    job = Escala().submit("pretrain", overrides=SMALL, options={"idempotency_key": "k"})
    Escala().stop(job.id)
    caplog.clear()
    assert Escala().submit("pretrain", overrides=SMALL, options={"idempotency_key": "k"}).state == "stopped"
    assert not caplog.records
    with pytest.raises(StateError):
        Escala().stop(job.id)


@pytest.mark.parametrize("limit", [0, -1, 1_000_001, 10**30])
def test_a_limit_that_is_none_is_an_error(own_home: Path, limit: int) -> None:
    for ask in (
        lambda: Escala().jobs(limit=limit),
        lambda: Escala().jobs(True, limit),
        lambda: Escala().runs(limit=limit),
    ):
        with pytest.raises(SpecError, match=f"--limit is {limit}"):
            ask()
    if limit == 0:
        done = escala("ps", "--limit", "0")
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr


def test_a_page_holds_what_runs_then_what_waits_in_order_then_says_that_there_is_more(
    own_home: Path, no_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from escala.cli.jobs import ps

    for name, priority in (("low", 1), ("high", 90), ("middle", 50)):
        Escala().submit("pretrain", overrides=SMALL, options={"name": name, "priority": priority})
    store = JobStore(Settings().database_url)
    store.claim_start(store.get("low"))
    store.close()
    assert [job.name for job in Escala().jobs(limit=2)] == ["low", "high"]
    assert [job.name for job in Escala().jobs(everything=True, limit=2)] == ["middle", "high"]
    ps(limit=2)
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3
    assert "the first 2; --limit shows more" in said.err
    ps(limit=3)
    assert "more" not in capsys.readouterr().err


def test_a_round_of_an_exploration_that_is_killed_is_submitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from escala.planning import explore
    from escala.planning.explore import Exploration, Round
    from escala.planning.limits import Limits

    keys: list[str] = []

    def sweep(
        settings: Settings, space: str, overrides: tuple[str, ...], options: dict[str, str], report: object
    ) -> None:
        keys.append(options["idempotency_key"])
        raise KeyboardInterrupt

    monkeypatch.setattr(explore, "_write_space", lambda *_: Path("space.yaml"))
    monkeypatch.setattr(explore.sweeps, "sweep", sweep)
    state = Exploration(
        "x", "x@1", Limits(compute_flops=1e21), 1e18, 1e19, 0.02, 2, [Round("x@1", [], key="explore-k")]
    )
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            explore._finish(Settings(), state, state.rounds[-1], print)
    assert keys == ["explore-k", "explore-k"]


def test_what_a_job_does_is_the_last_line_that_says_something(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from escala.contract.records import AttemptFiles
    from escala.jobs.actions import _doing

    files, job = AttemptFiles(tmp_path), SimpleNamespace(state="running", after=None)
    assert _doing(job, files) == "starts"
    files.log.write_text("first\n\x1b[36m(pid=1)\x1b[0m building the \x1b[1mtokenizer\n\n  \n")
    assert _doing(job, files) == "(pid=1) building the tokenizer"
