"""What the job store promises, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import insert, text

from escala.contract.errors import ClusterError, NotFoundError, SpecError, StateError, VersionError
from escala.contract.records import Outcome, Progress
from escala.jobs import database, tables
from escala.jobs.database import open_engine, writing
from escala.jobs.records import NewJob, Usage
from escala.jobs.state import BudgetSpent, DriverSeen, StopRequested
from escala.jobs.store import JobStore, LostRace

NEW = NewJob("pretrain", "workloads.pretrain", {"model": {"n_layers": 2}})
SPAWN = multiprocessing.get_context("spawn")


def open_and_list(url: str) -> int:
    """For another process: open the store, count the jobs."""
    return len(JobStore(url).list())


def claim_all(url: str) -> list[str]:
    """For another thread or process: claim every queued job that nobody else claims first."""
    store = JobStore(url)
    claimed = []
    while queue := store.queue(20):
        for job in queue:
            try:
                claimed.append(store.claim_start(job).submission_id)
            except LostRace:
                continue
    store.close()
    return claimed


def submit_with_key(url: str) -> str:
    """For another process: submit under a key that others use at the same time."""
    store = JobStore(url)
    job = store.submit(replace(NEW, idempotency_key="night"))
    store.close()
    return job.id


@pytest.fixture
def store(database_url):
    store = JobStore(database_url)
    yield store
    store.close()


class TestJobStore:
    def test_a_job_comes_back_as_it_was_submitted(self, store):
        parent = store.submit(NEW)
        new = NewJob(
            "pretrain",
            "workloads.pretrain",
            {"a": [1, 2.5, None, "ü"]},
            name="first",
            command=("escala", "submit", "pretrain"),
            priority=70,
            retries=1,
            after=parent.id,
            max_flops=1e21,
            max_seconds=12.5,
            resume_from="/checkpoints",
            parent=parent.id[:5],
            tags={"team": "x"},
        )
        job = store.submit(new)
        assert store.get(job.id) == job == store.list()[-1]
        assert (job.state, job.attempts, job.after, job.parent) == ("queued", 0, parent.id, parent.id)
        stored = {name: getattr(job, name) for name in ("config", "name", "priority", "retries", "max_flops")}
        assert stored == {name: getattr(new, name) for name in stored}
        assert tuple(job.command) == new.command
        assert (job.resume_from, job.tags, job.max_seconds) == ("/checkpoints", {"team": "x"}, 12.5)
        assert [e.state for e in store.events(job.id)] == ["queued"]

    def test_work_is_what_is_queued_or_under_way(self, store):
        assert not store.has_work()
        store.submit(NEW)
        assert store.has_work()
        (job,) = store.queue(1)
        store.claim_start(job)
        assert store.has_work()
        store.finish(store.get(job.id), Outcome("succeeded"), Usage())
        assert not store.has_work()

    def test_the_same_key_is_the_same_job(self, store):
        first = store.submit(replace(NEW, idempotency_key="night 1"))
        again = replace(
            NEW, idempotency_key="night 1", command=("escala", "again"), tags={"escala.rates": "other"}
        )
        assert store.submit(again) == first
        store.apply(first, StopRequested())
        assert store.submit(again).state == "stopped"  # whatever has become of it
        assert len({store.submit(NEW).id, store.submit(NEW).id, first.id}) == 3  # without a key each is a job
        for other in (
            {"config": {"model": {"n_layers": 3}}},
            {"name": "b"},
            {"priority": 51},
            {"retries": 0},
            {"max_flops": 1.0},
            {"resume_from": "/c"},
            {"workload": "sft"},
            {"after": first.id},
            {"experiment": "x"},
            {"tags": {"escala.code": "of another day"}},
        ):
            with pytest.raises(SpecError, match=f"night 1.*{first.id}.*{next(iter(other))}"):
                store.submit(replace(again, **other))
        assert len(store.list()) == 3

    def test_a_job_that_is_only_waited_for_as_a_start_is_no_other_spec_once_it_has_ended(self, store):
        base = store.submit(NEW)
        tuned = replace(NEW, config={"base": {"start": {"job": base.id}}}, idempotency_key="tuned")
        first = store.submit(replace(tuned, after=base.id))
        assert store.submit(tuned) == first
        assert first.after == base.id

    def test_a_list_of_one_workload_or_name(self, store):
        jobs = [
            store.submit(replace(NEW, workload=w, name=n))
            for w, n in (("sweep", "a"), ("pretrain", "a"), ("sweep", "b"), ("sweep", "a"))
        ]
        assert list(store.list(workload="sweep")) == [jobs[0], jobs[2], jobs[3]]
        assert list(store.list(workload="sweep", name="a", limit=1)) == [jobs[3]]

    def test_one_key_of_four_processes_at_once_is_one_job(self, store, database_url):
        with ProcessPoolExecutor(4, mp_context=SPAWN) as executor:
            ids = set(executor.map(submit_with_key, [database_url] * 4))
        assert ids == {job.id for job in store.list()}
        assert len(ids) == 1

    @pytest.mark.parametrize("key", [None, "mine"])
    def test_an_answer_that_is_lost_after_the_commit_doubles_nothing(self, store, monkeypatch, key):
        @contextmanager
        def lost(engine):
            with writing(engine) as connection:
                yield connection
            if not failures:
                failures.append(True)
                raise ClusterError("server closed the connection unexpectedly")

        failures = []
        monkeypatch.setattr("escala.jobs.store.writing", lost)
        monkeypatch.setattr("escala.jobs.store.SUBMIT_WAITS", (0.0, 0.0))
        job = store.submit(replace(NEW, idempotency_key=key))
        assert failures
        assert [j.id for j in store.list()] == [job.id]
        assert job.has_own_key == (key is None)

    def test_an_answer_to_a_stop_or_a_retry_that_is_lost_is_no_error(self, store, monkeypatch):
        @contextmanager
        def lost(engine):
            with writing(engine) as connection:
                yield connection
            raise ClusterError("server closed the connection unexpectedly")

        @contextmanager
        def failing(engine):
            raise ClusterError("no connection")
            yield

        job = store.submit(NEW)
        monkeypatch.setattr("escala.jobs.store.writing", lost)
        assert store.request_stop(job.id).state == "stopped"
        assert store.request_retry(job.id).state == "queued"
        monkeypatch.setattr("escala.jobs.store.writing", failing)
        with pytest.raises(ClusterError):
            store.request_stop(job.id)
        assert store.get(job.id).state == "queued"

    def test_a_database_from_before_the_keys_is_brought_up_to_date(self, store, database_url):
        from alembic import command
        from alembic.config import Config

        old = store.submit(NEW)
        engine = open_engine(database_url)
        config = Config()
        config.set_main_option("script_location", database.__file__.replace("database.py", "migrations"))
        with writing(engine) as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, "0001")
        found = JobStore(database_url).get(old.id)
        assert replace(found, idempotency_key=old.idempotency_key, spec_hash=old.spec_hash) == old
        assert (found.idempotency_key, found.spec_hash) == (None, None)

    def test_get_takes_id_name_and_unique_prefix(self, store):
        one, two = store.submit(replace(NEW, name="a")), store.submit(replace(NEW, name="b"))
        assert store.get("a") == one
        assert store.get(two.id[:7]) == two
        with pytest.raises(NotFoundError, match="several"):
            store.get("j")
        with pytest.raises(NotFoundError, match="no job 'c%'"):
            store.get("c%")
        with pytest.raises(NotFoundError):
            store.submit(replace(NEW, after="nothing"))

    def test_a_name_means_its_newest_job_that_succeeded_or_runs(self, store):
        def ended(outcome):
            job = store.submit(replace(NEW, name="first", retries=0))
            if outcome is not None:
                store.claim_start(job)
                store.finish(store.get(job.id), Outcome(outcome), Usage())
            return job.id

        failed = ended("user_error")
        assert store.get("first").id == failed  # the newest, where none is better
        good = ended("succeeded")
        worse = ended("user_error")
        assert store.get("first").id == good
        assert store.submit(replace(NEW, after="first", parent="first")).after == good
        with pytest.raises(StateError):
            store.request_stop("first")
        waiting = ended(None)
        assert store.get("first").id == waiting
        assert store.request_stop("first").id == waiting
        assert store.get("first").id == good
        assert store.request_retry("first").id == waiting  # it was stopped last
        assert store.get(worse).id == worse

    def test_an_attempt_from_claim_to_end(self, store):
        job = store.submit(NEW)
        attempt = store.claim_start(job)
        assert (attempt.number, attempt.submission_id) == (1, f"{job.id}-1")
        store.record_submitted(attempt)
        store.record_progress(attempt, Progress(5, 10, 640, 1e9, 2.0, 3.5, 320.0, None, 1.0))
        running = store.apply(store.get(job.id), DriverSeen())
        assert (running.state, running.train_tokens) == ("running", 640)
        lost = store.finish(running, Outcome("driver_lost", "gone"), Usage(640, 1e9, 2.0))
        assert (lost.state, lost.reason, lost.retries_used) == ("queued", "driver_lost", 1)
        second = store.claim_start(lost)
        outcome = Outcome("succeeded", checkpoint="c", record={"run_id": "r"})
        done = store.finish(store.get(job.id), outcome, Usage(1280, 2e9, 4.0, 7.0))
        assert done.state == "succeeded"
        assert (done.totals.attempts, done.totals.train_tokens, done.totals.compute_flops) == (2, 1920, 3e9)
        assert (done.totals.wall_seconds, done.totals.energy_joules) == (6.0, 7.0)
        first, second = store.attempts(job.id)
        assert first.submitted_at is not None
        assert first.progress["step"] == 5
        assert (second.number, second.outcome, second.checkpoint, second.record) == (
            2,
            "succeeded",
            "c",
            {"run_id": "r"},
        )
        states = [(e.state, e.attempt) for e in store.events(job.id)]
        assert states == [
            ("queued", 0),
            ("starting", 1),
            ("running", 1),
            ("queued", 1),
            ("starting", 2),
            ("succeeded", 2),
        ]
        assert [a.number for a in store.undelivered()] == [1, 2]
        store.record_delivered(first)
        assert [a.number for a in store.undelivered()] == [2]

    def test_a_stale_reading_loses(self, store):
        job = store.submit(NEW)
        store.claim_start(job)
        for stale in (lambda: store.claim_start(job), lambda: store.apply(job, BudgetSpent("all"))):
            with pytest.raises(LostRace):
                stale()
        assert len(store.attempts(job.id)) == 1
        assert store.get(job.id).state == "starting"

    def test_stop(self, store):
        queued, started = store.submit(NEW), store.submit(NEW)
        assert (store.request_stop(queued.id).state, store.get(queued.id).reason) == ("stopped", "user")
        store.claim_start(started)
        stopping = store.request_stop(started.id)
        assert (stopping.state, stopping.stop_requested) == ("stopping", True)
        assert store.attempts(started.id)[0].stopping_at is not None
        with pytest.raises(StateError, match="already stopping"):
            store.request_stop(started.id)
        with pytest.raises(StateError, match="already stopped"):
            store.request_stop(queued.id)
        again = store.request_retry(queued.id)
        assert (again.state, again.stop_requested, again.order) == ("queued", False, queued.order)
        with pytest.raises(StateError, match="stop it first"):
            store.request_retry(started.id)

    def test_the_queue_is_in_order_and_leaves_waiting_jobs_out(self, store):
        first = store.submit(NEW)
        urgent = store.submit(replace(NEW, priority=90))
        waiting = store.submit(replace(NEW, priority=100, after=first.id))
        assert [job.id for job in store.queue(10)] == [urgent.id, first.id]
        assert store.broken_dependencies() == []
        store.apply(first, StopRequested())
        assert [job.id for job in store.queue(10)] == [urgent.id]
        assert [(j.id, other, state) for j, other, state in store.broken_dependencies()] == [
            (waiting.id, first.id, "stopped")
        ]

    def test_a_waiting_job_may_start_once_the_other_succeeded(self, store):
        first = store.submit(NEW)
        waiting = store.submit(replace(NEW, after=first.id))
        store.claim_start(first)
        store.finish(store.get(first.id), Outcome("succeeded"), Usage())
        assert [job.id for job in store.queue(10)] == [waiting.id]
        assert store.get(first.id).totals.train_tokens is None

    @pytest.mark.parametrize("pool", ["threads", "processes"])
    def test_four_claimers_start_each_job_once(self, store, database_url, pool):
        jobs = [store.submit(NEW) for _ in range(20)]
        make = ThreadPoolExecutor(4) if pool == "threads" else ProcessPoolExecutor(4, mp_context=SPAWN)
        with make as executor:
            claims = [c for found in executor.map(claim_all, [database_url] * 4) for c in found]
        assert sorted(claims) == sorted(f"{job.id}-1" for job in jobs)
        assert all(len(store.attempts(job.id)) == 1 for job in jobs)

    def test_two_processes_may_open_a_new_database_at_once(self, database_url):
        with ProcessPoolExecutor(2, mp_context=SPAWN) as executor:
            assert [*executor.map(open_and_list, [database_url] * 2)] == [0, 0]

    def test_the_migrations_make_the_tables_that_the_code_uses(self, database_url):
        from alembic.autogenerate import compare_metadata
        from alembic.migration import MigrationContext

        with open_engine(database_url).connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []

    def test_a_newer_database_is_refused(self, store, database_url):
        with writing(open_engine(database_url)) as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(VersionError, match="another version"):
            JobStore(database_url)

    def test_opening_again_is_quick_and_imports_no_alembic(self, store, database_url, monkeypatch):
        for name in [m for m in sys.modules if m.split(".")[0] == "alembic"]:
            monkeypatch.delitem(sys.modules, name)
        seconds = []
        for _ in range(3):
            began = time.process_time()
            JobStore(database_url).close()
            seconds.append(time.process_time() - began)
        assert min(seconds) < 0.1
        assert "alembic" not in sys.modules

    def test_a_number_that_is_none_does_not_spoil_a_job(self, store):
        job = store.submit(replace(NEW, config={"a": [float("nan"), {"b": float("inf")}]}))
        assert store.get(job.id).config == {"a": [None, {"b": None}]}
        attempt = store.claim_start(job)
        store.record_progress(attempt, Progress(1, 2, 3, 4.0, 5.0, float("nan"), None, None, 1.0))
        record = {"attempt_tokens": "many", "attempt_flops": float("nan"), "wall_seconds": True}
        usage = Usage.of(Progress(1, 2, 2**62, 4.0, -5.0, None, None, None, 1.0), record)
        assert usage == Usage(None, 4.0, None)
        done = store.finish(store.get(job.id), Outcome("diverged", record={"loss": float("nan")}), usage)
        assert (done.state, done.compute_flops) == ("failed", 4.0)
        assert store.attempts(job.id)[0].record == {"loss": None}

    def test_a_job_that_waits_for_one_in_no_state_is_not_left_waiting(self, store, database_url):
        first = store.submit(NEW)
        waiting = store.submit(replace(NEW, after=first.id))
        with writing(open_engine(database_url)) as connection:
            connection.execute(text("UPDATE job SET state = 'bogus' WHERE id = :id"), {"id": first.id})
        assert [(j.id, o, s) for j, o, s in store.broken_dependencies()] == [(waiting.id, first.id, "bogus")]

    def test_a_lost_revision_is_noted_again(self, store, database_url, caplog):
        job = store.submit(NEW)
        for lose in ("DELETE FROM alembic_version", "DROP TABLE alembic_version"):
            with writing(open_engine(database_url)) as connection:
                connection.execute(text(lose))
            assert JobStore(database_url).get(job.id) == job
            with open_engine(database_url).connect() as connection:
                found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
            assert found == [database.HEAD]
        assert len(caplog.records) == 2

    def test_other_tables_without_a_revision_are_refused(self, store, database_url):
        with writing(open_engine(database_url)) as connection:
            connection.execute(text("DROP TABLE event"))
            connection.execute(text("DELETE FROM alembic_version"))
        with pytest.raises(ClusterError, match="says no revision, and has no table event") as caught:
            JobStore(database_url)
        assert "restore" in caught.value.hint

    def test_an_error_of_the_database_is_a_cluster_error(self, store, database_url):
        with writing(open_engine(database_url)) as connection:
            connection.execute(text("ALTER TABLE job RENAME COLUMN priority TO importance"))
        for ask in (store.list, lambda: store.submit(NEW), lambda: store.queue(3), lambda: store.get("x")):
            with pytest.raises(ClusterError) as caught:
                ask()
            assert caught.value.hint

    def test_text_that_is_no_unicode_is_refused(self, store):
        with pytest.raises(SpecError, match="not valid Unicode"):
            store.submit(replace(NEW, name="\udcff"))

    def test_an_empty_database_beside_jobs_is_refused(self, database_url, tmp_path):
        job = tmp_path / "jobs" / "jabcdefg"
        job.mkdir(parents=True)
        with pytest.raises(ClusterError, match="has no job, but") as caught:
            JobStore(database_url, home=tmp_path)
        assert "mv" in caught.value.hint
        job.rmdir()
        JobStore(database_url, home=tmp_path).submit(NEW)
        job.mkdir()
        assert len(JobStore(database_url, home=tmp_path).list()) == 1

    def test_ten_thousand_jobs(self, store, database_url):
        job = store.submit(NEW)
        alone = ("order", "idempotency_key")
        template = {c.name: getattr(job, c.name) for c in tables.job.columns if c.name not in alone}
        config = {"section": {f"key_{i}": i for i in range(60)}}
        rows = [template | {"id": f"x{i}", "priority": i % 100, "config": config} for i in range(10_000)]
        for row in rows[1000:]:
            row["state"] = "succeeded"
        with writing(open_engine(database_url)) as connection:
            connection.execute(insert(tables.job), rows)
        timings = {"list": 9.0, "queue": 9.0, "waiting": 9.0}
        for _ in range(3):
            began = time.process_time()
            assert len(store.list(["queued"])) == 1001
            timings["list"] = min(timings["list"], time.process_time() - began)
            began = time.process_time()
            assert [job.priority for job in store.waiting(20)] == [99] * 10 + [98] * 10
            timings["waiting"] = min(timings["waiting"], time.process_time() - began)
            began = time.process_time()
            assert [job.priority for job in store.queue(20)] == [99] * 10 + [98] * 10
            timings["queue"] = min(timings["queue"], time.process_time() - began)
        print(timings)
        assert timings["list"] < 0.2
        assert timings["queue"] < 0.1
        assert timings["waiting"] < 0.02


@pytest.fixture
def file(tmp_path):
    return tmp_path / "escala.db"


@pytest.fixture
def sqlite_store(file):
    store = JobStore(f"sqlite:///{file}")
    yield store
    store.close()


def spoil(file, change):
    """What nobody but SQLite, and a person with its shell, would do."""
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA ignore_check_constraints=ON")
        connection.execute(change)
    connection.close()


class TestDamagedRows:
    """SQLite takes any value into any column; one bad row costs itself."""

    @pytest.mark.parametrize(
        "change",
        [
            "config = 'not json'",
            "config = '[1, 2]'",
            "config = ''",
            f"config = '{'[' * 20_000}'",
            "command = '{}'",
            "tags = 'null'",
            "tags = '{\"a\": 1}'",
            "state = 'bogus'",
            "priority = 'high'",
            "retries = 1.5",
            "attempts = -1",
            "revision = 9223372036854775807",
            "changed_at = 9e999",
            "submitted_at = 'yesterday'",
            "message = X'FFFE'",
            "revision = 'x'",
            "attempts = X'00'",
            "name = X'FF'",
            "id = '../../etc'",
            "max_flops = 'all'",
        ],
    )
    def test_the_others_are_listed_and_start(self, sqlite_store, file, change, caplog):
        bad, good = sqlite_store.submit(replace(NEW, priority=90)), sqlite_store.submit(NEW)
        column, value = change.split(" = ", 1)
        spoil(file, f"UPDATE job SET {column} = {value} WHERE id = '{bad.id}'")
        for _ in range(2):
            assert [job.id for job in sqlite_store.list()] == [good.id]
            assert [job.id for job in sqlite_store.list(limit=1)] == [good.id]
            assert [job.id for job in sqlite_store.queue(1)] == [good.id]
        assert sqlite_store.get(good.id) == good
        assert len(caplog.records) == 1
        assert "damaged" in caplog.text
        if column != "id":
            with pytest.raises(StateError, match=column):
                sqlite_store.get(bad.id)
        assert sqlite_store.claim_start(good).number == 1

    @pytest.mark.parametrize("change", ["progress = '{'", "record = '3'", "progress = '[]'"])
    def test_an_attempt_without_its_report_is_as_before_it(self, sqlite_store, file, change):
        job = sqlite_store.submit(NEW)
        sqlite_store.claim_start(job)
        spoil(file, f"UPDATE attempt SET {change}")
        (attempt,) = sqlite_store.attempts(job.id)
        assert (attempt.progress, attempt.record) == (None, None)

    def test_a_bad_attempt_or_event_costs_itself(self, sqlite_store, file):
        jobs = [sqlite_store.submit(NEW) for _ in range(2)]
        for job in jobs:
            sqlite_store.claim_start(job)
        spoil(file, f"UPDATE attempt SET claimed_at = 'x' WHERE job_id = '{jobs[0].id}'")
        spoil(file, f"UPDATE event SET state = 'x' WHERE job_id = '{jobs[0].id}' AND attempt = 1")
        assert [a.job_id for a in sqlite_store.undelivered()] == [jobs[1].id]
        assert [e.state for e in sqlite_store.events(jobs[0].id)] == ["queued"]

    def test_a_column_of_a_newer_version_is_no_trouble(self, sqlite_store, file):
        job = sqlite_store.submit(NEW)
        spoil(file, "ALTER TABLE job ADD COLUMN colour TEXT DEFAULT 'red'")
        assert sqlite_store.get(job.id) == job
        assert sqlite_store.submit(NEW).order == job.order + 1


class TestDamagedFile:
    """What can be wrong with the file of a SQLite database."""

    def refused(self, file, match):
        with pytest.raises(ClusterError, match=match) as caught:
            JobStore(f"sqlite:///{file}").list()
        assert caught.value.hint
        assert len(str(caught.value).splitlines()) == 2

    def test_not_a_database(self, file):
        file.write_text("these are no pages of a database at all, " * 100)
        self.refused(file, "damaged or no SQLite database")

    def test_truncated(self, file, sqlite_store):
        for _ in range(50):
            sqlite_store.submit(NEW)
        sqlite_store.close()
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size // 2)
        self.refused(file, "damaged or no SQLite database")

    def test_a_directory(self, file):
        file.mkdir()
        self.refused(file, "no regular file")

    def test_a_pipe(self, file):
        os.mkfifo(file)
        self.refused(file, "no regular file")

    def test_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        self.refused(tmp_path / "file" / "escala.db", "cannot be made")

    def test_emptied(self, file, sqlite_store, tmp_path):
        job = sqlite_store.submit(NEW)
        sqlite_store.close()
        (tmp_path / "jobs" / job.id).mkdir(parents=True)
        file.write_bytes(b"")
        self.refused(file, "was lost or replaced")
        file.unlink()
        self.refused(file, "was lost or replaced")
        assert not file.exists()  # nothing is in a backup's way
        (tmp_path / "jobs").rename(tmp_path / "jobs.old")
        assert JobStore(f"sqlite:///{file}").list() == []

    def test_locked(self, file, sqlite_store, monkeypatch):
        monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
        store = JobStore(f"sqlite:///{file}")
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ClusterError, match="is busy"):
            store.submit(NEW)
        other.execute("COMMIT")
        assert store.submit(NEW).state == "queued"

    @pytest.mark.parametrize("locked", ["", "escala.db"])
    def test_another_users(self, locked):
        """In a process that is no longer root's, where we are root."""
        with tempfile.TemporaryDirectory(dir="/tmp") as directory:
            home = Path(directory)
            store = JobStore(f"sqlite:///{home}/escala.db")
            store.submit(NEW)
            store.close()
            home.chmod(0o555)
            (home / locked).chmod(0o000)
            code = (
                "import os, sys; from escala.jobs.store import JobStore; from escala.jobs.records import NewJob\n"
                "from escala.contract.errors import ClusterError\n"
                "os.geteuid() or os.seteuid(12345)\n"
                "try: JobStore(sys.argv[1]).submit(NewJob('a', 'b', {}))\n"
                "except ClusterError as error: print(error)"
            )
            words = [sys.executable, "-c", code, f"sqlite:///{home}/escala.db"]
            done = subprocess.run(words, capture_output=True, text=True)
            (home / locked).chmod(0o700)
            home.chmod(0o700)
        assert "hint: make" in done.stdout, done.stderr
        assert "Traceback" not in done.stderr

    def test_it_is_private(self, tmp_path):
        store = JobStore(f"sqlite:///{tmp_path}/home/escala.db")
        store.submit(NEW)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "home").iterdir()}
        assert {"escala.db", "escala.db-wal"} <= modes.keys()
        assert set(modes.values()) == {0o600}
        assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
        (tmp_path / "home" / "escala.db").chmod(0o644)  # as earlier versions left it
        JobStore(f"sqlite:///{tmp_path}/home/escala.db").close()
        assert (tmp_path / "home" / "escala.db").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_is_an_error_that_says_so_and_passes(disk):
    store = JobStore(f"sqlite:///{disk.path}/escala.db")
    first = store.submit(NEW)
    disk.fill()
    with pytest.raises(ClusterError, match="no room on its disk"):
        store.submit(replace(NEW, config={"x": "y" * 300_000}))
    with pytest.raises(ClusterError, match="no room"):
        JobStore(f"sqlite:///{disk.path}/other/escala.db")
    assert store.get(first.id) == first
    disk.free()
    assert store.submit(NEW).state == "queued"


def submit_when_told(url, number, go, found):
    """For another process: open a database that nobody has made yet, and submit."""
    go.wait()
    try:
        found.put(JobStore(url).submit(replace(NEW, name=f"n{number}")).id)
    except BaseException as error:
        found.put(repr(error))
        raise


def test_a_hundred_processes_may_submit_at_once_into_a_new_database(tmp_path):
    url = f"sqlite:///{tmp_path}/escala.db"
    fork = multiprocessing.get_context("fork")  # a hundred new interpreters would take minutes
    go, found = fork.Event(), fork.SimpleQueue()
    processes = [fork.Process(target=submit_when_told, args=(url, n, go, found)) for n in range(100)]
    for process in processes:
        process.start()
    go.set()
    ids = [found.get() for _ in processes]
    for process in processes:
        process.join(60)
    jobs = JobStore(url).list()
    assert sorted(ids) == sorted(job.id for job in jobs)
    assert sorted(job.name for job in jobs) == sorted(f"n{n}" for n in range(100))


def test_the_stated_head_is_the_last_migration():
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", database.__file__.replace("database.py", "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == database.HEAD


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("nonsense", SpecError),
        ("mysql://x/y", SpecError),
        ("sqlite://", SpecError),
        ("postgresql://escala:secret@127.0.0.1:1/x", ClusterError),
    ],
)
def test_an_address_that_cannot_be_used_says_so_without_the_password(url, error):
    with pytest.raises(error) as caught:
        JobStore(url)
    assert caught.value.hint
    assert "secret" not in str(caught.value)
