"""One attempt from its spec to its outcome; and a new workload from two files: its record, its entry module."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from escala.contract import handshake
from escala.contract.attempt import request_stop
from escala.contract.errors import DataError, SpecError
from escala.contract.records import (
    AttemptFiles,
    AttemptSpec,
    Control,
    JobFiles,
    Outcome,
    Progress,
    read_record,
    write_json,
)
from escala.schema import BenchConfig
from escala.schema.workloads import WORKLOADS, get_workload, register, submittable
from escala.spec import load_job, resolve
from escala.sweeps import tuner
from escala.tracking.lineage import code_fingerprint
from escala.tracking.lineage.lifecycle import LiveAttempt
from escala.tracking.spool import read_events
from workloads import bench, trial

SCHEMA = """
from escala.schema.base import Strict
from escala.schema.workloads import Workload

class CountConfig(Strict):
    text: str = "a b"

COUNT = Workload("count", "words of a text", "my_count", CountConfig, result="figures")
"""
ENTRY = """
import sys
from escala.tracking.lineage.lifecycle import run_attempt
from escala.tracking.tracker import Metric
from my_schema import CountConfig

def count(attempt):
    config = attempt.open(CountConfig.model_validate)
    tracker, run_id = attempt.run
    tracker.metrics(run_id, [Metric("words", float(len(config.text.split())), 0, 1)])

def main(arguments):
    return run_attempt(arguments, count)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(WORKLOADS)
    yield
    WORKLOADS.clear()
    WORKLOADS.update(before)


def attempt_spec(
    home: Path, workload: str, config: dict[str, Any], number: int = 1, **changes: Any
) -> AttemptSpec:
    job = JobFiles(home, "j1")
    files = job.attempt(number)
    files.directory.mkdir(parents=True)
    values = {
        "job_id": "j1",
        "attempt": number,
        "name": "first",
        "workload": workload,
        "entry_point": get_workload(workload).entry_point,
        "config": config,
        "directory": str(files.directory),
        "checkpoints": str(job.checkpoints),
        "data": str(home / "data"),
        "tracking_uri": f"spool:{files.spool}",
        "experiment": "tests",
        "versions": handshake.versions(),
    }
    spec = AttemptSpec(**values | changes)
    write_json(files.spec, spec)
    return spec


def told(spec: AttemptSpec) -> dict[str, Any]:
    """What the attempt gave to the tracker: start, all tags together, artifacts, metrics, the end."""
    found: dict[str, Any] = {"tags": {}, "texts": {}, "metrics": [], "status": None}
    for event in read_events(AttemptFiles(spec.directory).spool):
        if event["event"] == "start":
            found["start"] = event
        found["tags"] |= event.get("tags") or {}
        if "path" in event:
            found["texts"][event["path"]] = event["content"]
        found["metrics"] += event.get("points") or []
        found["status"] = event.get("status", found["status"])
    return found


def outcome(spec: AttemptSpec) -> Outcome:
    found = read_record(Outcome, AttemptFiles(spec.directory).outcome)
    assert found is not None
    return found


@pytest.mark.usefixtures("registry")
def test_a_workload_is_added_by_its_record_and_its_entry_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_schema.py").write_text(SCHEMA)
    (tmp_path / "my_count.py").write_text(ENTRY)
    monkeypatch.syspath_prepend(tmp_path)
    import my_count  # type: ignore[import-not-found]  # written above
    import my_schema  # type: ignore[import-not-found]

    register(my_schema.COUNT)
    with pytest.raises(SpecError, match="already"):
        register(my_schema.COUNT)
    assert "count" in [each.name for each in submittable()]
    job = load_job("count", overrides=["text=one two three"])
    assert (job.entry_point, job.plain()) == ("my_count", {"text": "one two three"})
    with pytest.raises(SpecError, match="depends on its data"):
        resolve(job)
    spec = attempt_spec(tmp_path, "count", job.plain())
    assert my_count.main([str(AttemptFiles(spec.directory).spec)]) == 0
    assert outcome(spec).kind == "succeeded"
    found = told(spec)
    assert found["start"]["params"] == {"text": "one two three"}
    assert [(name, value) for name, value, *_ in found["metrics"]] == [("words", 3.0)]
    assert found["status"] == "FINISHED"
    for name in ("my_count", "my_schema"):
        sys.modules.pop(name)


def test_what_is_no_submitted_workload_says_how_it_is_started() -> None:
    with pytest.raises(SpecError, match="a bench is not submitted") as caught:
        load_job("bench")
    assert "escala bench device" in caught.value.hint
    with pytest.raises(SpecError, match="no workload 'pretran'") as caught:
        load_job("pretran")
    assert caught.value.hint == "did you mean pretrain?"


def test_every_attempt_names_its_job_its_attempt_and_what_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of workloads that train nothing, too; here the second attempt of a bench."""
    measured = {"workers": 1, "device": "CPU"}

    def measure(_work: object, arguments: dict[str, Any], *_: object) -> None:
        write_json(Path(arguments["facts"]), measured)

    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr(bench, "NodeWatch", lambda: None)
    monkeypatch.setattr(bench, "start_workers", measure)
    spec = attempt_spec(
        tmp_path, "bench", BenchConfig().model_dump(mode="json"), 2, tags={"escala.space": "s"}
    )
    assert bench.main([str(AttemptFiles(spec.directory).spec)]) == 0
    found = told(spec)
    assert found["start"]["name"] == "first (attempt 2)"
    tags = found["tags"]
    assert {key: tags[f"escala.{key}"] for key in ("job_id", "attempt", "workload", "name", "space")} == {
        "job_id": "j1",
        "attempt": "2",
        "workload": "bench",
        "name": "first",
        "space": "s",
    }
    assert len(tags["escala.config_fingerprint"]) == len(tags["escala.code_fingerprint"]) == 64
    assert tags["mlflow.source.name"] == "escala bench device"
    record = json.loads(tags["escala.record"])
    assert (record["status"], record["workers"], record["attempt"]) == ("succeeded", 1, 2)
    assert json.loads(found["texts"]["device.json"]) == measured
    assert {"config.json", "run_record.json"} <= set(found["texts"])
    assert outcome(spec).record == json.loads(found["texts"]["run_record.json"])


def test_the_commit_of_a_checkout_is_recorded() -> None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout")
    assert code_fingerprint().git_commit == found.stdout.strip()


def in_attempt(spec: AttemptSpec, error: BaseException, **options: Any) -> LiveAttempt:
    with LiveAttempt(spec, **options) as attempt:
        attempt.open(BenchConfig.model_validate)
        raise error
    return attempt


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (DataError("no text", "give some"), "user_error", 3),
        (KeyError("a slip"), "internal", 1),
        (SystemExit(2), "internal", 1),
    ],
)
def test_whatever_is_raised_is_in_the_outcome(
    tmp_path: Path, error: BaseException, kind: str, code: int
) -> None:
    spec = attempt_spec(tmp_path, "bench", {})
    attempt = in_attempt(spec, error)
    assert (attempt.exit_code, outcome(spec).kind, told(spec)["status"]) == (code, kind, "FAILED")


def test_a_trial_that_tune_ends_leaves_no_outcome(tmp_path: Path) -> None:
    """The process goes on with other trials; the sweep's driver says that this one was cut off."""
    spec = attempt_spec(tmp_path, "bench", {})
    with pytest.raises(SystemExit):
        in_attempt(spec, SystemExit(0), whole_process=False)
    assert not AttemptFiles(spec.directory).outcome.exists()


def test_a_superseded_attempt_writes_its_outcome_and_leaves_its_run_alone(tmp_path: Path) -> None:
    spec = attempt_spec(tmp_path, "bench", {})
    write_json(AttemptFiles(spec.directory).current, 2)
    with LiveAttempt(spec) as attempt:
        attempt.open(BenchConfig.model_validate)
    assert (attempt.exit_code, outcome(spec).kind) == (11, "superseded")
    assert not list(read_events(AttemptFiles(spec.directory).spool))


def test_what_fails_because_it_is_stopped_before_its_first_step_is_no_failure(tmp_path: Path) -> None:
    """The control plane kills its processes then; the driver may live to see its workers die."""
    spec = attempt_spec(tmp_path, "bench", {})
    files = AttemptFiles(spec.directory)
    write_json(files.control, Control("user"))
    attempt = in_attempt(spec, RuntimeError("the workers died"))
    assert (attempt.exit_code, outcome(spec).kind) == (0, "user")
    assert told(spec)["status"] is None  # the control plane closes its run
    write_json(files.progress, Progress(1, 9, 64, 1e3, 1.0, None, None, None, 0.0))
    assert in_attempt(spec, RuntimeError("a slip")).outcome.kind == "internal"


def test_a_configuration_that_is_none_fails_before_a_run_is_opened(tmp_path: Path) -> None:
    spec = attempt_spec(tmp_path, "bench", {"width": 3})
    with LiveAttempt(spec) as attempt:
        attempt.open(BenchConfig.model_validate)
    assert (attempt.exit_code, outcome(spec).kind) == (2, "user_error")
    assert "the bench configuration is not valid" in outcome(spec).message


def test_a_sweep_without_a_point_fails_with_the_first_reason(tmp_path: Path) -> None:
    spec = attempt_spec(tmp_path, "sweep", {"vary": {"n_total": [1e5]}})
    with LiveAttempt(spec, summarise=tuner.sweep_summary) as attempt:
        attempt.open(tuner.Space.model_validate)
        attempt.outcome = tuner.Sweep(attempt).ending()
    assert attempt.exit_code == 1
    assert outcome(spec).message == "no trial gave a point: it has no trials"
    assert {"points.csv", "refused.csv", "config.json"} <= set(told(spec)["texts"])
    stopped = attempt_spec(tmp_path, "sweep", {"vary": {"n_total": [1e5]}}, 2)
    request_stop(AttemptFiles(stopped.directory), "user")
    with LiveAttempt(stopped) as attempt:
        attempt.open(tuner.Space.model_validate)
        attempt.outcome = tuner.Sweep(attempt).ending()
    assert (attempt.exit_code, told(stopped)["status"]) == (0, "KILLED")


def test_a_trial_says_in_its_outcome_why_it_could_not_train(tmp_path: Path) -> None:
    spec = attempt_spec(tmp_path, "pretrain", {"model": {"n_layer": 2}})
    found = trial.run(spec, prepared=None)  # type: ignore[arg-type]  # it fails before it reads any data
    assert found == outcome(spec)
    assert "pretrain configuration is not valid" in found.message
    assert "escala: attempt 1 of j1: user_error" in AttemptFiles(spec.directory).log.read_text()


@pytest.mark.skipif(not (Path(__file__).parents[2] / ".git").exists(), reason="no git checkout")
def test_a_checkout_tells_its_commit() -> None:
    commit = code_fingerprint().git_commit
    assert commit is not None
    assert len(commit) == 40
