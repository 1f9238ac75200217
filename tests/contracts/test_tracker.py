"""What every tracker does: MLflow itself, and the spool with its delivery, seen in one MLflow database."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from escala.contract.errors import ClusterError, NotFoundError, SpecError
from escala.contract.records import (
    AttemptFiles,
    AttemptSpec,
    JobFiles,
    Outcome,
    RunRecord,
    TrialFiles,
    write_json,
)
from escala.tracking import spool as spool_module
from escala.tracking.children import PARENT_TAG, SWEEP_ATTEMPT_TAG, FamilyDelivery
from escala.tracking.delivery import Delivery
from escala.tracking.lineage import canonical_json, code_fingerprint, fingerprint
from escala.tracking.mlflow_tracker import MlflowTracker, joined_tag, split_tag
from escala.tracking.queries import get_run, list_runs, run_url
from escala.tracking.spool import DROPPED_TAG, SpoolTracker, close_spool
from escala.tracking.tracker import Dataset, Metric, Tracker, open_tracker
from tests.small_disk import Disk


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One database for the file: its creation takes seconds. Tests use experiments of their own."""
    directory = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)  # MLflow puts a database's artifacts under the directory it is opened in
        yield f"sqlite:///{directory}/mlflow.db"


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return request.node.name


@pytest.fixture(scope="module")
def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


@pytest.fixture(params=["mlflow", "spool"])
def opened(request: pytest.FixtureRequest, uri: str, tmp_path: Path) -> tuple[Tracker, Callable[[], None]]:
    """(tracker, what makes its words arrive)."""
    if request.param == "mlflow":
        return MlflowTracker(uri), lambda: None
    directory = tmp_path / "spool"
    delivery = Delivery(uri)
    return SpoolTracker(directory), lambda: [delivery.deliver(directory), None][1]


def only_run(client: Any, experiment: str) -> Any:
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len(found) == 1
    return found[0]


def points(key: str, count: int, first: int = 0) -> list[Metric]:
    return [Metric(key, float(i), i, 1_700_000_000_000 + i) for i in range(first, first + count)]


def test_a_whole_run(opened: Any, client: Any, experiment: str) -> None:
    tracker, arrive = opened
    run_id = tracker.start("job-1", experiment, "first", {"a": "1"}, {"lr": "0.1"}, time_ms=1_700_000_000_000)
    tracker.metrics(run_id, points("loss", 2500))
    data = Dataset("corpus", "0123456789abcdef" * 4, source={"root": "x"}, profile={"tokens": 5})
    tracker.dataset(run_id, data)
    tracker.dataset(run_id, data)
    tracker.tags(run_id, {"a": "2", "b": "x"})
    tracker.text(run_id, "folder/note.json", '{"é": 1}')
    tracker.finish(run_id, "FINISHED", time_ms=1_700_000_007_500)
    arrive()
    run = only_run(client, experiment)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_000, 1_700_000_007_500)
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("corpus", "0123456789abcdef")
    assert (json.loads(given.dataset.source), json.loads(given.dataset.profile)) == (
        {"root": "x"},
        {"tokens": 5},
    )
    assert {tag.key: tag.value for tag in given.tags} == {"mlflow.data.context": "training"}
    assert "Runs of escala" in client.get_experiment(run.info.experiment_id).tags["mlflow.note.content"]
    assert run.data.params == {"lr": "0.1"}
    assert {"a": "2", "b": "x"}.items() <= run.data.tags.items()
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(i, float(i)) for i in range(2500)]
    path = client.download_artifacts(run.info.run_id, "folder/note.json")
    assert json.loads(Path(path).read_text()) == {"é": 1}


def test_one_key_is_one_run_and_a_repeated_point_counts_once(
    opened: Any, client: Any, experiment: str
) -> None:
    tracker, arrive = opened
    for _ in range(2):
        run_id = tracker.start("job-1", experiment, "name", {}, {"lr": "0.1"})
        tracker.metrics(run_id, points("loss", 3))
    tracker.finish(run_id, "KILLED")
    arrive()
    run = only_run(client, experiment)
    assert run.info.status == "KILLED"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 3


def test_beyond_mlflows_limits(opened: Any, client: Any, experiment: str) -> None:
    tracker, arrive = opened
    params = {f"p{i}": "v" for i in range(250)} | {"long": "x" * 7000}
    long = "y" * 20_000
    run_id = tracker.start("job-1", experiment, "name", {"long": long}, params)
    tracker.finish(run_id, "FINISHED")
    arrive()
    run = only_run(client, experiment)
    assert len(run.data.params) == 251
    assert run.data.params["long"].endswith("x…")
    assert joined_tag(run.data.tags, "long") == long


@pytest.mark.parametrize("length", [0, 1, 7999, 8000, 8001, 16000, 24001])
def test_a_long_tag_survives_and_may_shrink(length: int) -> None:
    tags = dict(split_tag("t", "a" * 24001)) | dict(split_tag("t", "b" * length))
    assert joined_tag(tags, "t") == "b" * length
    assert all(len(value) <= 8000 for value in tags.values())


class Flaky:
    """A real tracker behind a connection that breaks after `calls` more calls."""

    def __init__(self, inner: Tracker, calls: int, before: bool) -> None:
        self._inner, self.calls, self._before = inner, calls, before

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls -= 1
            if self.calls < 0 and self._before:
                raise ConnectionError("away")
            answer = getattr(self._inner, name)(*arguments)
            if self.calls < 0:
                raise ConnectionError("away, after it was done")
            return answer

        return call


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("calls", range(5))
def test_cut_off_at_every_call_nothing_is_lost_or_doubled(
    uri: str, client: Any, experiment: str, tmp_path: Path, calls: int, before: bool
) -> None:
    directory = tmp_path / "spool"
    spool = SpoolTracker(directory)
    spool.start("job-1", experiment, "name", {"a": "1"}, {"p": "1"})
    spool.metrics("", points("loss", 1500))
    spool.text("", "note.txt", "hello")
    spool.finish("", "FINISHED")
    flaky = Flaky(MlflowTracker(uri), calls, before)
    first = Delivery(lambda: flaky).deliver(directory)
    assert first is (flaky.calls >= 0)
    assert Delivery(uri).deliver(directory)  # another process, later
    run = only_run(client, experiment)
    assert run.info.status == "FINISHED"
    assert (directory / "run_id").read_text() == run.info.run_id
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 1500


def test_a_tracker_that_is_away_is_said_once_and_waited_for(
    uri: str, client: Any, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, now = tmp_path / "spool", [0.0]
    spool = SpoolTracker(directory)
    spool.start("job-1", experiment, "name", {}, {})
    flaky = Flaky(MlflowTracker(uri), 0, before=True)
    delivery = Delivery(lambda: flaky, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING, "escala.delivery"):
        for _ in range(10):
            now[0] += 0.2
            assert not delivery.deliver(directory)
    assert len(caplog.records) == 1
    assert flaky.calls >= -4  # waits double: 0.5 s, 1 s, ...
    spool.finish("", "FINISHED")
    flaky.calls, now[0] = 100, 100.0
    assert delivery.deliver(directory)
    assert only_run(client, experiment).info.status == "FINISHED"


def test_an_absent_server_is_an_error_within_seconds(tmp_path: Path) -> None:
    spool = SpoolTracker(tmp_path)
    spool.start("job-1", "experiment", "name", {}, {})
    begun = time.monotonic()
    assert not Delivery("http://127.0.0.1:9").deliver(tmp_path)
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:9 does not answer"):
        list_runs("http://127.0.0.1:9")
    assert time.monotonic() - begun < 15


def test_delivered_while_it_is_written_by_two(uri: str, client: Any, experiment: str, tmp_path: Path) -> None:
    """The driver opens and closes the run; rank 0, in a process of its own, measures."""
    driver, rank, delivery = SpoolTracker(tmp_path / "s"), SpoolTracker(tmp_path / "s"), Delivery(uri)
    run_id = driver.start("job-1", experiment, "name", {}, {})
    assert not delivery.deliver(tmp_path / "s")
    rank.metrics(run_id, points("loss", 10))
    assert not delivery.deliver(tmp_path / "s")
    rank.metrics(run_id, points("loss", 10, first=10))
    with next((tmp_path / "s").glob("*-1.jsonl")).open("ab") as file:
        file.write(b'{"event":"metrics","poi')  # killed while it wrote
    driver.finish(run_id, "FAILED")
    assert delivery.deliver(tmp_path / "s")
    run = only_run(client, experiment)
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 20
    assert run.info.status == "FAILED"


def test_a_killed_writers_run_is_closed(uri: str, client: Any, experiment: str, tmp_path: Path) -> None:
    close_spool(tmp_path / "none", "KILLED")
    assert Delivery(uri).deliver(tmp_path / "none")
    SpoolTracker(tmp_path / "s").start("job-1", experiment, "name", {}, {})
    for _ in range(2):
        close_spool(tmp_path / "s", "KILLED")
    assert len(list((tmp_path / "s").glob("*.jsonl"))) == 2
    assert Delivery(uri).deliver(tmp_path / "s")
    assert only_run(client, experiment).info.status == "KILLED"


def test_a_refused_event_is_left_out(uri: str, client: Any, experiment: str, tmp_path: Path) -> None:
    spool = SpoolTracker(tmp_path / "s")
    run_id = spool.start("job-1", experiment, "name", {}, {})
    spool.metrics(run_id, [Metric("no?such*name", 1.0, 0, 1)])
    spool.tags(run_id, {"after": "1"})
    spool.finish(run_id, "FINISHED")
    assert Delivery(uri).deliver(tmp_path / "s")
    assert only_run(client, experiment).data.tags["after"] == "1"


BAD_LINES = [
    b"not json",
    b"",
    b"[]",
    b"7",
    b"[" * 100_000,
    b'{"event": "explode"}',
    b'{"event": ["tags"]}',
    b'{"kind": "tags"}',
    b'{"event": "metrics"}',
    b'{"event": "metrics", "points": {"loss": 1}}',
    b'{"event": "metrics", "points": [["loss", "low", 1, 1], ["loss", 1.0], 5, [1, 2.0, 3, 4]]}',
    b'{"event": "metrics", "points": [["loss", 1.0, 1e400, 1], ["loss", 1.0, 99999999999999999999, 1]]}',
    b'{"event": "tags", "tags": {"a": 1}}',
    b'{"event": "tags", "tags": null}',
    b'{"event": "text", "path": 5, "content": "x"}',
    b'{"event": "text", "path": "../../outside", "content": "x"}',
    b'{"event": "finish", "status": "MAYBE"}',
    b'{"event": "start", "key": "other"}',
    b"\xff\xfe\x00",
    b'{"event":"metrics","poi{"event":"tags","tags":{"lost":"1"}}',
]


def test_bad_events_cost_themselves(
    uri: str, client: Any, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = SpoolTracker(tmp_path / "s")
    spool.start("job-1", experiment, "name", {}, {})
    file = next((tmp_path / "s").iterdir())
    for number, line in enumerate(BAD_LINES):
        with file.open("ab") as stream:
            stream.write(line + b"\n")
        spool.metrics("", points("loss", 1, first=number))
    spool.tags("", {"odd": "nul \0 and \ud800", "after": "1"})
    spool.finish("", "FINISHED")
    assert Delivery(uri).deliver(tmp_path / "s")
    run = only_run(client, experiment)
    assert run.info.status == "FINISHED"
    assert run.data.tags["after"] == "1"
    assert {m.step for m in client.get_metric_history(run.info.run_id, "loss")} == set(range(len(BAD_LINES)))
    assert not (tmp_path.parent / "outside").exists()
    told = [r for r in caplog.records if r.name == "escala.delivery"]
    assert 1 <= len(told) <= 3  # each kind of trouble once


def test_of_a_refused_batch_only_the_bad_points_are_left_out(
    uri: str, client: Any, experiment: str, tmp_path: Path
) -> None:
    spool = SpoolTracker(tmp_path / "s")
    run_id = spool.start("job-1", experiment, "name", {}, {"bad?name*": "1", "good": "2"})
    spool.metrics(
        run_id, [*points("loss", 300), Metric("no?such*name", 1.0, 0, 1), *points("loss", 300, 300)]
    )
    spool.tags(run_id, {"a" * 300: "x", "b": "y"})
    spool.finish(run_id, "FINISHED")
    assert Delivery(uri).deliver(tmp_path / "s")
    run = only_run(client, experiment)
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 600
    assert run.data.tags["b"] == "y"


@pytest.mark.parametrize("when", ["before its end", "before anything"])
def test_a_run_that_was_deleted_is_set_aside(
    uri: str, client: Any, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    delivery, spools = Delivery(uri), [SpoolTracker(tmp_path / name) for name in "ab"]
    for number, spool in enumerate(spools):
        spool.start(f"job-{number}", experiment, "name", {}, {})
        if when == "before its end":
            spool.metrics("", points("loss", 3))
        assert not delivery.deliver(tmp_path / "ab"[number])
    client.delete_run((tmp_path / "a" / "run_id").read_text())
    for spool in spools:
        spool.metrics("", points("loss", 3, first=3))
        spool.finish("", "FINISHED")
    for _ in range(3):
        assert delivery.deliver(tmp_path / "a")
        assert delivery.deliver(tmp_path / "b")
    assert len([r for r in caplog.records if "was deleted" in r.message]) == 1
    assert only_run(client, experiment).info.status == "FINISHED"
    assert Delivery(uri).deliver(tmp_path / "a")  # another process, later


def test_a_run_that_the_tracker_has_lost_is_delivered_from_the_beginning(
    uri: str, client: Any, experiment: str, tmp_path: Path
) -> None:
    spool = SpoolTracker(tmp_path / "s")
    spool.start("job-1", experiment, "name", {}, {})
    spool.metrics("", points("loss", 3))
    delivery = Delivery(uri)
    assert not delivery.deliver(tmp_path / "s")
    state = json.loads((tmp_path / "s" / "delivered.json").read_text())
    (tmp_path / "s" / "delivered.json").write_text(json.dumps({**state, "run_id": "0" * 32}))
    spool.finish("", "FINISHED")
    assert not delivery.deliver(tmp_path / "s")
    assert delivery.deliver(tmp_path / "s")
    run = only_run(client, experiment)
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 3


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"offsets": {"x": "y"}}', '{"offsets": 3}', '{"offsets": {}}']
)
def test_a_damaged_state_is_delivered_again_without_doubling(
    uri: str, client: Any, experiment: str, tmp_path: Path, content: str
) -> None:
    spool, delivery = SpoolTracker(tmp_path / "s"), Delivery(uri)
    experiment = f"{experiment}-{len(content)}"
    spool.start("job-1", experiment, "name", {}, {})
    spool.metrics("", points("loss", 3))
    assert not delivery.deliver(tmp_path / "s")
    (tmp_path / "s" / "delivered.json").write_text(content)
    spool.finish("", "FINISHED")
    assert delivery.deliver(tmp_path / "s")
    assert len(client.get_metric_history(only_run(client, experiment).info.run_id, "loss")) == 3


class Refusing:
    """A tracker that has a fault with the run of one key, and is away altogether while `away`."""

    def __init__(self, inner: Tracker, key: str, error: Exception) -> None:
        self._inner, self._key, self._error = inner, key, error
        self.away, self.asked = False, 0

    def start(self, key: str, *arguments: Any) -> str:
        self.asked += 1
        if self.away:
            raise ConnectionError("away")
        if key == self._key:
            raise self._error
        return self._inner.start(key, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    "error", [RuntimeError("a fault of the server"), ConnectionError("cut off"), TimeoutError()]
)
def test_one_run_that_is_not_taken_holds_no_other_up(
    uri: str, client: Any, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    now, tracker = [0.0], Refusing(MlflowTracker(uri), "job-0", error)
    delivery = Delivery(lambda: tracker, clock=lambda: now[0])
    names = [f"{type(error).__name__}-{number}" for number in range(4)]
    for number, name in enumerate(names):
        spool = SpoolTracker(tmp_path / name)
        spool.start(f"job-{number}", f"{experiment}-{type(error).__name__}", name, {}, {})
        spool.finish("", "FINISHED")
    assert [delivery.deliver(tmp_path / name) for name in names] == [False, True, True, True]
    asked = tracker.asked
    for _ in range(20):
        now[0] += 0.1
        assert not delivery.deliver(tmp_path / names[0])
    assert tracker.asked - asked <= 3  # it waits by itself: 0.5 s, 1 s, ...
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


def test_a_tracker_that_is_away_is_asked_for_two_runs_at_most(
    uri: str, experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now, tracker = [0.0], Refusing(MlflowTracker(uri), "", RuntimeError())
    delivery = Delivery(lambda: tracker, clock=lambda: now[0])
    names = [str(number) for number in range(10)]
    for name in names:
        spool = SpoolTracker(tmp_path / name)
        spool.start(f"job-{name}", experiment, name, {}, {})
        spool.finish("", "FINISHED")
    tracker.away = True
    for _ in range(3):
        assert not any(delivery.deliver(tmp_path / name) for name in names)
    assert tracker.asked == 2
    assert len([r for r in caplog.records if "the tracker does not take runs" in r.message]) == 1
    tracker.away, now[0] = False, 1.0
    assert sum(delivery.deliver(tmp_path / name) for name in names) == len(names)  # nobody waits any longer


def test_an_attempt_that_ended_is_closed_whatever_its_spool_has_lost(
    uri: str, client: Any, experiment: str, tmp_path: Path
) -> None:
    files = JobFiles(tmp_path, "jabc").attempt(1)
    files.directory.mkdir(parents=True)
    given = {"directory": str(files.directory), "checkpoints": "c", "data": "d", "tracking_uri": "t"}
    write_json(
        files.spec, AttemptSpec("jabc", 1, "name", "pretrain", "w", {}, **given, experiment=experiment)
    )
    SpoolTracker(files.spool).metrics("", points("loss", 3))
    next(files.spool.iterdir()).open("ab").write(b'{"event":"finish","sta')
    delivery = FamilyDelivery(Delivery(uri), tmp_path)
    assert not delivery.deliver(files.directory, lost=False)
    write_json(files.outcome, Outcome("succeeded"))
    assert delivery.deliver(files.directory, lost=False)
    run = only_run(client, experiment)
    assert (run.info.status, run.data.tags["escala.job_id"]) == ("FINISHED", "jabc")
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 3


def test_a_full_disk_keeps_a_delivery_waiting_only(
    uri: str, client: Any, experiment: str, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    spool, now = SpoolTracker(disk.path / "s"), [0.0]
    spool.start("job-1", experiment, "name", {}, {})
    spool.finish("", "FINISHED")
    delivery = Delivery(uri, clock=lambda: now[0])
    disk.fill()
    for _ in range(5):
        now[0] += 100
        assert not delivery.deliver(disk.path / "s")
    assert [r.message for r in caplog.records if "room on the disk" in r.message] == [
        r.message for r in caplog.records if r.levelno >= logging.WARNING
    ]
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    disk.free()
    now[0] += 100
    assert delivery.deliver(disk.path / "s")
    assert only_run(client, experiment).info.status == "FINISHED"


def test_the_spool_is_bounded_and_says_so(tmp_path: Path) -> None:
    spool = SpoolTracker(tmp_path, limit_bytes=10_000)
    spool.start("job-1", "e", "name", {}, {})
    for first in range(0, 5000, 100):
        spool.metrics("job-1", points("loss", 100, first))
    spool.finish("job-1", "FINISHED")
    events = list(spool_module.read_events(tmp_path))
    kept = sum(len(e["points"]) for e in events if e["event"] == "metrics")
    dropped = [int(e["tags"][DROPPED_TAG]) for e in events if e["event"] == "tags"]
    assert 0 < kept < 5000
    assert kept + dropped[-1] == 5000
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 12_000


def test_runs_are_read_back(uri: str, experiment: str, tmp_path: Path) -> None:
    tracker = open_tracker(uri)
    for number in range(3):
        tags = {"escala.job_id": f"job{number}", "escala.attempt": "1", "escala.workload": "pretrain",
                "escala.name": f"n{number}", "escala.config_fingerprint": "abc"}  # fmt: skip
        run_id = tracker.start(f"{experiment}-{number}", experiment, f"n{number}", tags, {})
        if number:
            record = RunRecord(None, f"job{number}", 1, f"n{number}", "pretrain", "succeeded", 5.0 + number,
                               held_out_loss_nats=2.5, reason="long " * 3000)  # fmt: skip
            tracker.tags(run_id, {"escala.record": json.dumps(asdict(record)), "x": "y"})
            tracker.finish(run_id, "FINISHED")
    found = list_runs(uri, experiment)
    assert [r.job_id for r in found] == ["job2", "job1", "job0"]
    assert found[0].held_out_loss_nats == 2.5
    assert found[0].reason == "long " * 3000
    assert (found[2].status, found[2].config_fingerprint) == ("running", "abc")
    assert [r.job_id for r in list_runs(uri, experiment, status="succeeded", limit=1)] == ["job2"]
    assert [r.name for r in list_runs(uri, experiment, job_id="job1")] == ["n1"]
    assert list_runs(uri, "no such experiment") == []
    run_id = str(found[1].run_id)
    assert get_run(uri, experiment, run_id) == get_run(uri, None, run_id[:12]) == found[1]
    with pytest.raises(NotFoundError, match="no run"):
        get_run(uri, experiment, "zzz")
    with pytest.raises(NotFoundError, match="database"):
        run_url(uri, run_id)


@pytest.mark.parametrize("written", ["{", "[]", "7", '{"attempt": 1}'])
def test_a_run_with_a_damaged_record_hides_no_other(uri: str, experiment: str, written: str) -> None:
    tracker, experiment = open_tracker(uri), f"{experiment}-{len(written)}"
    for number, attempt in enumerate(("1", "x")):
        tags = {"escala.attempt": attempt, "escala.name": f"n{number}", "escala.record": written}
        tracker.start(f"{experiment}-{number}", experiment, "name", tags, {})
    assert sorted((r.name, r.attempt) for r in list_runs(uri, experiment)) == [("n0", 1), ("n1", 0)]


def test_an_unknown_kind_of_address() -> None:
    with pytest.raises(SpecError, match="ftp"):
        open_tracker("ftp://somewhere")


def test_fingerprints() -> None:
    assert canonical_json({"b": (1, 2.5), "a": None}) == '{"a":null,"b":[1,2.5]}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
    assert len(fingerprint(1)) == 64
    refused: list[tuple[Any, str]] = [
        ({"x": {1, 2}}, r"value\.x is a set"),
        ({"x": [float("nan")]}, r"value\.x\[0\] is nan"),
        ({"x": object()}, r"value\.x is a object"),
        ({1: 2}, "key 1"),
    ]
    for value, name in refused:
        with pytest.raises(SpecError, match=name):
            fingerprint(value)
    assert len(code_fingerprint().fingerprint) == 64
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        asked = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        assert code_fingerprint().git_commit == asked.stdout.strip()


def test_trials_stand_under_their_sweep(uri: str, client: Any, experiment: str, tmp_path: Path) -> None:
    """Each through a spool of its own, the trials' first: MLflow's pages nest them by the parent's tag."""

    def attempt(files: AttemptFiles, key: str, tags: dict[str, str]) -> None:
        files.directory.mkdir(parents=True)
        given = {
            "name": key,
            "workload": "pretrain",
            "entry_point": "x",
            "config": {},
            "checkpoints": "",
            "data": "",
        }
        place = {"directory": str(files.directory), "tracking_uri": f"spool:{files.spool}"}
        write_json(files.spec, AttemptSpec("job", 1, **given, **place, experiment=experiment, tags=tags))
        spool = SpoolTracker(files.spool)
        spool.start(key, experiment, key, tags, {})
        spool.finish("", "FINISHED")
        write_json(files.outcome, Outcome("succeeded"))

    sweep = JobFiles(tmp_path, "job").attempt(1)
    attempt(sweep, "sweep", {})
    for name in ("aa", "bb"):
        attempt(TrialFiles(tmp_path, name).attempt(1), f"trial-{name}", {SWEEP_ATTEMPT_TAG: "job-1"})
    attempt(TrialFiles(tmp_path, "cc").attempt(1), "trial-cc", {SWEEP_ATTEMPT_TAG: "other-1"})
    lines = [
        *(json.dumps({"fingerprint": name}) for name in ("aa", "bb", "cc", "../../etc")),
        '{"cut',
        "[]",
        "{}",
    ]
    JobFiles(tmp_path, "job").trials.write_text("\n".join(lines) + "\n")
    assert FamilyDelivery(Delivery(uri), tmp_path).deliver(sweep.directory, lost=False)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    parents = {run.info.run_name: run.data.tags.get(PARENT_TAG) for run in found}
    sweep_id = next(run.info.run_id for run in found if run.info.run_name == "sweep")
    assert parents == {"sweep": None, "trial-aa": sweep_id, "trial-bb": sweep_id}
