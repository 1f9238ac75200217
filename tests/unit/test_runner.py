"""The reconcile step against an in-memory backend: whatever it is killed at, it loses and doubles nothing.

The backend here is the other side of the `JobBackend` protocol; its drivers write the same files as real ones.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from escala.contract.records import (
    AttemptFiles,
    AttemptSpec,
    JobFiles,
    Outcome,
    Progress,
    read_record,
    write_json,
)
from escala.jobs import reconcile
from escala.jobs.backends.base import Submission
from escala.jobs.reconcile import Reconciler
from escala.jobs.records import NewJob
from escala.jobs.runner import only_one
from escala.jobs.store import JobStore
from escala.storage.files import read_stored, write_stored
from tests.memory_backend import MemoryBackend


class Crash(BaseException):
    """The process is killed here."""


@dataclass
class Killer:
    """Kills right after the operations with these numbers took effect, which is before the next one."""

    at: range = range(0)
    count: int = 0

    def around(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.count += 1
            number = self.count
            result = operation(*args, **named)
            if number in self.at:
                raise Crash
            return result

        return call


class Breakable:
    """An object whose every method goes through the killer."""

    def __init__(self, inner: Any, killer: Killer) -> None:
        self._inner, self._killer = inner, killer

    def __getattr__(self, name: str) -> Any:
        return self._killer.around(getattr(self._inner, name))


class Cluster(MemoryBackend):
    """The backend and its drivers. `plans`: what the n-th driver of a job does; the default is to succeed."""

    def __init__(self, home: Path, plans: dict[str, list[str]]) -> None:
        super().__init__()
        self.home, self.plans = home, plans
        self.steps = True  # a driver makes its first step at once
        self.fences: list[tuple[str, str]] = []  # as they stood at each submission

    def submit(self, submission: Submission) -> None:
        self._answer()
        assert submission.id not in self.drivers
        job_id, _, number = submission.id.rpartition("-")
        assert read_record(AttemptSpec, self._files(submission.id).spec).attempt == int(number)
        self.fences.append((submission.id, (self.home / "jobs" / job_id / "current").read_text()))
        super().submit(submission)

    def _files(self, submission_id: str) -> AttemptFiles:
        job_id, _, number = submission_id.rpartition("-")
        return AttemptFiles(self.home / "jobs" / job_id / f"attempt-{number}")

    def tick(self) -> None:
        """Every driver takes a step: pending -> running with a log -> what its plan says."""
        for submission_id, status in list(self.drivers.items()):
            files = self._files(submission_id)
            if status == "pending":
                files.log.write_text("started\n")
                if self.steps:
                    write_json(files.progress, Progress(1, 2, 64, 1e6, 1.0, 5.0, 64.0, None, 1.0))
                self.drivers[submission_id] = "running"
            elif status == "running":
                self._end(submission_id, files)

    def _end(self, submission_id: str, files: AttemptFiles) -> None:
        name = read_record(AttemptSpec, files.spec).name
        plan = self.plans.get(name, [])
        number = int(submission_id.rpartition("-")[2])
        act = plan[number - 1] if number <= len(plan) else "succeeded"
        if act == "obey" and files.control.exists():
            write_json(files.outcome, Outcome(json.loads(files.control.read_text())["stop"]))
        elif act not in ("vanish", "obey", "hang"):
            usage = {"attempt_tokens": 128, "attempt_flops": 2e6, "wall_seconds": 2.0}
            write_json(files.outcome, Outcome(act, "said so", record=usage))
        if act != "hang" and (act != "obey" or files.control.exists()):
            self.drivers[submission_id] = "ended"


class World:
    """A store, a cluster and a clock; reconcilers come and go."""

    def __init__(self, tmp_path: Path, plans: dict[str, list[str]] | None = None, store: Path | None = None):
        self.now = 1000.0
        if store is not None:
            shutil.copy(store, tmp_path / "jobs.db")
        self.store = JobStore(f"sqlite:///{tmp_path}/jobs.db", lambda: self.now)
        self.cluster = Cluster(tmp_path, plans or {})
        self.killer = Killer()
        self.delivered: list[Path] = []
        self.home = tmp_path
        self.born()

    def born(self) -> None:
        store, backend = Breakable(self.store, self.killer), Breakable(self.cluster, self.killer)
        self.reconciler = Reconciler(
            store, backend, self.home, lambda job: {}, 2, self._deliver, lambda: self.now
        )

    def _deliver(self, directory: Path, lost: bool) -> bool:
        self.delivered.append(directory)
        return True

    def submit(self, name: str, **named: Any) -> str:
        return self.store.submit(NewJob("pretrain", "workloads.pretrain", {}, name=name, **named)).id

    def tick(self) -> None:
        try:
            self.reconciler.step()
            self.reconciler.deliver()
        except Crash:
            self.born()
        self.cluster.tick()
        self.now += 2.0

    def until(self, true: Callable[[], bool], limit: int = 60) -> None:
        for _ in range(limit):
            if true():
                return
            self.tick()
        raise AssertionError([(j.name, j.state, j.reason) for j in self.store.list()])

    def run(self) -> None:
        self.until(lambda: not self.store.list(("queued", "starting", "running", "stopping")))

    def end(self) -> dict[str, Any]:
        return {j.name: (j.state, j.reason, j.attempts, j.train_tokens) for j in self.store.list()}


PLANS = {
    "lost once": ["vanish"],
    "bad": ["user_error"],
    "preempted": ["preempted", "vanish"],
    "stop me": ["obey"],
    "spent": ["vanish"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "lost once": {"retries": 1},
    "preempted": {"retries": 1, "priority": 90},
    "stop me": {"priority": 100},
    "spent": {"max_flops": 1e6, "retries": 3},
}
BAD = ("failed", "user_error", 1, 128)  # comes with "after bad"
EXPECTED = {
    "plain": ("succeeded", None, 1, 128),
    "lost once": ("succeeded", None, 2, 64 + 128),
    "after bad": ("failed", "dependency", 0, None),
    "preempted": ("succeeded", None, 3, 128 + 64 + 128),
    "stop me": ("stopped", "user", 1, 64),
    "spent": ("stopped", "budget", 1, 64),
}


def play(world: World, names: tuple[str, ...] = tuple(EXPECTED)) -> None:
    """The story of these jobs: `stop me` is stopped once it runs."""
    world.cluster.plans = PLANS
    for name in names:
        named = dict(OPTIONS.get(name, {}))
        if name == "after bad":
            named["after"] = world.submit("bad")
        world.submit(name, **named)
    world.until(lambda: world.store.get("stop me").state == "running")
    world.store.request_stop("stop me")
    world.run()
    world.until(lambda: not world.store.undelivered())


@pytest.fixture
def breakable_files(monkeypatch):
    def use(killer: Killer) -> None:
        monkeypatch.setattr(reconcile, "write_stored", killer.around(write_stored))
        monkeypatch.setattr(reconcile, "read_stored", killer.around(read_stored))

    return use


def check(world: World, names: tuple[str, ...] = tuple(EXPECTED)) -> None:
    expected = {name: EXPECTED[name] for name in names}
    assert world.end() == expected | ({"bad": BAD} if "after bad" in names else {})
    started = [a.submission_id for job in world.store.list() for a in world.store.attempts(job.id)]
    assert sorted(world.cluster.submissions) == sorted(started), "each attempt is submitted exactly once"
    assert all(submission.endswith(f"-{fence}") for submission, fence in world.cluster.fences)


def test_undisturbed(tmp_path):
    world = World(tmp_path)
    play(world)
    check(world)


def test_an_idle_loop_asks_whether_there_is_work_and_nothing_else(tmp_path):
    world = World(tmp_path)
    asked: list[str] = []

    class Store:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(world.store, name)

    world.store.submit(NewJob("pretrain", "workloads.pretrain", {}, name="plain"))
    world.run()
    world.until(lambda: not world.store.undelivered())
    idle = Reconciler(Store(), world.cluster, tmp_path, lambda job: {}, 2, world._deliver, lambda: world.now)
    idle.step()
    assert asked == ["has_work"]
    again = world.submit("again")
    idle.step()
    assert world.store.get(again).state == "starting"


def killed_world(directory: Path, migrated: Path, kills: range, breakable_files: Any) -> World:
    directory.mkdir()
    world = World(directory, store=migrated)
    world.killer = Killer(kills)
    world.born()
    breakable_files(world.killer)
    return world


@pytest.fixture
def migrated(tmp_path):
    World(tmp_path).store.close()  # closing folds the write-ahead log into the file
    return tmp_path / "jobs.db"


@pytest.mark.slow
def test_killed_after_any_operation_it_loses_and_doubles_nothing(tmp_path, migrated, breakable_files):
    """Every operation on store, backend and files in turn, until the story ends before the kill."""
    story = ("lost once", "stop me")
    at, ended = 0, False
    while not ended:
        at += 1
        world = killed_world(tmp_path / str(at), migrated, range(at, at + 1), breakable_files)
        play(world, story)
        check(world, story)
        ended = world.killer.count < at
        world.store.close()
        shutil.rmtree(world.home)
    assert at > 50


@pytest.mark.parametrize("stride", [53, 71])
def test_killed_again_and_again_it_loses_and_doubles_nothing(tmp_path, migrated, breakable_files, stride):
    world = killed_world(tmp_path / "w", migrated, range(stride, 100_000, stride), breakable_files)
    play(world)
    check(world)


def test_a_head_that_is_away_is_waited_for_and_a_restarted_one_has_lost_its_jobs(tmp_path):
    world = World(tmp_path, {"x": ["hang"]})
    job = world.submit("x")
    world.until(lambda: world.store.get(job).state == "running")
    world.cluster.up = False
    for _ in range(20):
        world.tick()
    assert world.store.get(job).state == "running"
    world.cluster.up = True
    world.cluster.restart()
    world.run()
    assert world.cluster.submissions == [f"{job}-1", f"{job}-2"]
    assert [a.outcome for a in world.store.attempts(job)] == ["driver_lost", "succeeded"]


def test_an_unanswered_submission_that_ran_is_lost_not_repeated(tmp_path):
    """Submitted, killed before it was noted, and the head restarted: the log shows that the attempt ran."""
    world = World(tmp_path, {"x": ["hang"]})
    job = world.submit("x")
    attempt = world.store.claim_start(world.store.get(job))
    world.reconciler.directory(attempt).mkdir(parents=True)
    AttemptFiles(world.reconciler.directory(attempt)).log.write_text("started\n")
    world.run()
    assert world.cluster.submissions == [f"{job}-2"]


def test_who_does_not_stop_is_killed_after_the_grace(tmp_path):
    world = World(tmp_path, {"x": ["hang"]})
    job = world.submit("x")
    world.until(lambda: world.store.get(job).state == "running")
    world.store.request_stop(job)
    asked = world.now
    world.run()
    assert world.cluster.stopped == [f"{job}-1"]
    assert 60 < world.now - asked < 80
    assert world.end()["x"][:2] == ("stopped", "user")


@pytest.mark.parametrize("state", ["starting", "running"])
@pytest.mark.parametrize("progress", [None, Progress(3, 9, 0, 0.0, 1.0, 5.0, None, None, 1.0)])
def test_who_has_not_made_a_step_is_stopped_at_once(tmp_path, state, progress):
    """`running` is a driver that is there: it imports, prepares data, starts Serve, Ray Train, DeepSpeed. A sweep may
    have progress then: trials that were finished before.
    """
    world = World(tmp_path, {"x": ["hang"]})
    world.cluster.steps = False
    job = world.submit("x")
    world.until(lambda: world.store.get(job).state == state)
    files = JobFiles(tmp_path, job).attempt(1)
    if progress is not None:
        write_json(files.progress, progress)
    world.store.request_stop(job)
    world.reconciler.step()
    assert world.end()["x"][:2] == ("stopped", "user")
    assert world.cluster.stopped == [f"{job}-1"]
    assert json.loads(files.control.read_text())["stop"] == "user"  # should it outlive the kill
    assert read_record(Outcome, files.outcome).record is None
    world.store.request_retry(job)
    world.cluster.steps = True
    world.until(lambda: world.store.get(job).state == "running")
    assert world.store.get(job).attempts == 2


def test_a_start_that_overruns_its_seconds_ends_at_once(tmp_path):
    world = World(tmp_path, {"x": ["hang"]})
    world.cluster.steps = False
    world.submit("x", max_seconds=20.0)
    world.run()
    assert world.end()["x"][:2] == ("stopped", "budget")
    assert world.now - 1000.0 < 20.0 + 30.0 + 10.0  # the budget, its grace, and no other one


def test_who_overruns_its_seconds_is_asked_then_killed(tmp_path):
    world = World(tmp_path, {"x": ["hang"]})
    world.submit("x", max_seconds=20.0)
    world.run()
    assert len(world.cluster.stopped) == 1
    assert world.end()["x"][:2] == ("stopped", "budget")


def test_stopped_between_claim_and_submission_it_never_runs(tmp_path):
    world = World(tmp_path)
    job = world.submit("x")
    world.store.claim_start(world.store.get(job))
    world.store.request_stop(job)
    world.run()
    assert world.cluster.submissions == []
    assert world.end()["x"][:2] == ("stopped", "user")


def test_one_job_that_breaks_holds_no_other_up(tmp_path):
    world = World(tmp_path)
    broken, fine = world.submit("broken"), world.submit("fine")
    world.until(lambda: world.store.get(broken).state == "starting")
    AttemptFiles(tmp_path / "jobs" / broken / "attempt-1").outcome.write_text("{")
    world.until(lambda: world.store.get(fine).state == "succeeded")


def test_the_lock_lets_one_runner_in(tmp_path):
    code = (
        "from pathlib import Path; from escala.jobs.runner import only_one; "
        f"only_one(Path({str(tmp_path)!r})).__enter__()"
    )
    with only_one(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode == 1
        assert "another runner" in other.stderr
    with only_one(tmp_path):
        pass


def test_a_resumed_job_lost_before_its_first_checkpoint_starts_from_the_old_one_again(tmp_path: Path) -> None:
    world = World(tmp_path, {"resumed": ["vanish"]})
    job_id = world.submit("resumed", resume_from="/old/checkpoints")
    world.until(lambda: world.store.get(job_id).state == "succeeded")
    assert world.store.get(job_id).attempts == 2
    for number in (1, 2):
        spec = read_record(AttemptSpec, JobFiles(tmp_path, job_id).attempt(number).spec)
        assert spec.resume_from == "/old/checkpoints"


# Damage: one job's trouble is not another's


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kind": 5}', "\0" * 50])
@pytest.mark.parametrize("file", ["outcome", "progress", "control"])
def test_a_damaged_file_of_one_job_holds_nobody_up(tmp_path, caplog, file, content):
    world = World(tmp_path, {"bad": ["hang", "succeeded"], "good": ["succeeded"]})
    bad, good = world.submit("bad", retries=1), world.submit("good")
    world.until(lambda: world.store.get(bad).state == "running")
    files = JobFiles(tmp_path, bad).attempt(1)
    getattr(files, file).write_text(content)
    for _ in range(3):
        world.tick()
        world.reconciler.step()
    assert len([r for r in caplog.records if "damaged" in r.message]) == (file != "control")
    world.cluster.drivers[f"{bad}-1"] = "ended"
    world.run()
    assert world.store.get(good).state == "succeeded"
    assert [a.outcome for a in world.store.attempts(bad)] == ["driver_lost", "succeeded"]


def test_a_damaged_fence_is_written_again(tmp_path):
    world = World(tmp_path, {"x": ["hang"]})
    job = world.submit("x")
    world.until(lambda: world.store.get(job).state == "running")
    current = JobFiles(tmp_path, job).attempt(1).current
    for content in (b"", b"\xff", b"{"):
        current.write_bytes(content)
        world.tick()
        assert current.read_text() == "1"
    current.unlink()
    world.tick()
    assert current.read_text() == "1"
    current.write_text("7")  # a person's or a later attempt's word stays
    world.tick()
    assert current.read_text() == "7"


def test_rows_that_cannot_be_carried_out_fail_and_free_their_slots(tmp_path):
    world = World(tmp_path, {})
    lost, odd, good = world.submit("lost"), world.submit("odd"), world.submit("good")
    world.store.claim_start(world.store.get(lost))
    with sqlite3.connect(tmp_path / "jobs.db") as database:
        database.execute("DELETE FROM attempt WHERE job_id = ?", (lost,))
        database.execute("UPDATE job SET config = '{\"resources\": 5}' WHERE id = ?", (odd,))
    database.close()

    def environment(job):
        return job.config.get("resources", {}).get("threads_per_worker", 1)

    world.reconciler._environment = environment
    world.run()
    assert [world.store.get(job).state for job in (lost, odd, good)] == ["failed", "failed", "succeeded"]
    assert "cannot be read from the job database" in world.store.get(lost).message
    assert "configuration cannot be used" in world.store.get(odd).message
    assert world.cluster.submissions == [f"{good}-1"]


def test_a_huge_outcome_is_kept_in_part(tmp_path):
    world = World(tmp_path, {"x": ["hang"]})
    job = world.submit("x")
    world.until(lambda: world.store.get(job).state == "running")
    write_json(JobFiles(tmp_path, job).attempt(1).outcome, Outcome("k" * 1000, "m" * 10**6, "h" * 10**6))
    world.run()
    found = world.store.get(job)
    assert (found.state, found.reason, len(found.message)) == ("failed", "k" * 32, 20_000)


def test_a_job_that_cannot_be_started_takes_nobodys_place(tmp_path):
    world = World(tmp_path, {})
    world.reconciler._limit = 1
    spent, odd, good = (
        world.submit(name, priority=90 - i) for i, name in enumerate(("spent", "odd", "good"))
    )
    with sqlite3.connect(tmp_path / "jobs.db") as connection:
        connection.execute("UPDATE job SET max_flops = 0 WHERE id = ?", (spent,))
        connection.execute("INSERT INTO attempt (job_id, number, claimed_at, message, hint, delivered) "
                           "VALUES (?, 1, 0, '', '', TRUE)", (odd,))  # fmt: skip
    connection.close()
    world.until(lambda: world.store.get(good).state == "succeeded")
    assert [world.store.get(job).state for job in (spent, odd)] == ["stopped", "queued"]


def test_an_outcome_that_no_database_takes_ends_its_job(tmp_path):
    world = World(tmp_path, {"x": ["hang"]})
    job = world.submit("x")
    world.until(lambda: world.store.get(job).state == "running")
    said = "No such file: 'caf\udce9.txt' \0"  # a name that is not UTF-8, as Python's errors show it
    write_json(JobFiles(tmp_path, job).attempt(1).outcome, Outcome("user_error", said, said, said))
    world.run()
    found = world.store.get(job)
    assert (found.state, found.message) == ("failed", "No such file: 'caf\\udce9.txt' \\x00")


def test_a_full_disk_is_waited_for(disk, tmp_path, caplog):
    world = World(tmp_path, {})
    world.home = world.cluster.home = disk.path
    world.born()
    job = world.submit("x")
    disk.fill()
    for _ in range(5):
        world.tick()
    assert world.store.get(job).state == "starting"
    warnings = [r.message for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert all("waits until there is room on the disk" in text for text in warnings)
    assert len(warnings) == len({text.split()[0] for text in warnings}) <= 2  # the queue, the job: once each
    disk.free()
    world.run()
    assert (world.store.get(job).state, world.cluster.submissions) == ("succeeded", [f"{job}-1"])


def test_a_clock_that_is_set_ahead_kills_nobody(tmp_path):
    world = World(tmp_path, {"x": ["obey"]})
    ticks = [0.0]
    world.reconciler = Reconciler(
        world.store, world.cluster, tmp_path, lambda job: {}, 2, world._deliver, lambda: world.now,
        ticks=lambda: ticks[0],
    )  # fmt: skip
    job = world.submit("x")
    world.until(lambda: world.store.get(job).state == "running")
    world.cluster.drivers[f"{job}-1"] = "ended"  # its outcome is on its way
    world.reconciler.step()
    world.now += 3600
    world.reconciler.step()
    assert world.store.get(job).attempts == 1
    ticks[0] += 10
    world.reconciler.step()
    assert world.store.attempts(job)[0].outcome == "driver_lost"
