"""Times, durations and numbers look the same everywhere, and a reason is never cut."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from datetime import datetime

import pytest

from escala.cli import render
from escala.jobs.records import Job
from escala.views.jobs import JobDetailsView, JobView
from escala.views.run_records import RunView

REASON = "data/train.jsonl:4 has no `messages`; it has: " + ", ".join(f"key_{i}" for i in range(80))
JOB = Job(
    1, "j0000001", "a-name", "sft", "workloads.sft", "escala", {"a": 1}, ["escala", "submit"], {}, 50, 2, 0, None,
    None, 5400.0, None, None, 1.796e9, "failed", "user_error", REASON, "correct the line", 3, False, 1, 1.796e9 + 61,
    1_234_567, 1.5e15, 3725.5, None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0 s"),
        (0.2512, "0.25 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (725.2, "12 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3725.5, "1 h 02 min"),
        (86_399.0, "1 d 00 h"),
        (276_000.0, "3 d 05 h"),
        (float("inf"), "inf"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert render.duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1_234_567, "1,234,567"),
        (0.0, "0"),
        (2.29841, "2.2984"),
        (0.34234, "0.3423"),
        (0.0012345, "0.001234"),
        (5e-5, "5e-05"),
        (22.8431, "22.843"),
        (1536.8949, "1,536.9"),
        (44_450.3697, "44,450"),
        (357_312.0, "357,310"),
        (999_994.0, "999,990"),
        (999_996.0, "1e+06"),
        (-1536.8949, "-1,536.9"),
        (6.17e10, "6.17e+10"),
        (100.0, "100"),
        (float("nan"), "nan"),
        (None, "-"),
        (True, "True"),
        ("text", "text"),
    ],
)
def test_numbers(value: object, shown: str) -> None:
    assert render.number(value) == shown


def test_a_time_is_a_time_where_we_are() -> None:
    shown = render.value("submitted_at", 1.796e9)
    assert datetime.strptime(shown, "%Y-%m-%d %H:%M:%S %z").timestamp() == 1.796e9
    assert render.value("wall_seconds", 3725.5) == "1 h 02 min"
    assert render.value("submitted_at", 1e30) == "1e+30"
    assert render.value("stop_requested", True) == "True"
    assert render.value("step_seconds", None) == "-"


def test_a_job_shows_its_times_and_its_whole_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from escala.jobs.actions import JobDetails
    from escala.jobs.records import HistoryEvent

    monkeypatch.setattr(time, "time", lambda: 1.796e9 + 125)
    events = [HistoryEvent(1, JOB.id, 1, JOB.changed_at, "failed", "user_error", REASON)]
    render.job(JobDetailsView.of(JobDetails(JOB, JOB.totals, [], [], events)), False)
    shown = capsys.readouterr().out
    assert "e+09" not in shown
    assert re.search(r"submitted_at +2026-1[12]-\d\d \d\d:\d\d:\d\d [+-]\d{4}", shown)
    assert re.search(r"wall_seconds +1 h 02 min", shown)
    assert re.search(r"max_seconds +1 h 30 min", shown)
    assert shown.count(REASON) == 2  # in the job, and in its history
    render.jobs([JobView.of(JOB)], False)
    shown = capsys.readouterr().out
    assert f"failed: {REASON}\nhint: correct the line\n" in shown
    assert "2 min 05 s ago" in shown


def test_the_reason_of_a_run_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    from escala.contract.records import RunRecord

    run = RunRecord(
        "r" * 32, "j0000001", 1, "a", "sft", "user_error", 1.796e9, wall_seconds=42.0, reason=REASON
    )
    render.runs([RunView.of(run)], False)
    assert f"j0000001-1 user_error: {REASON}\n" in capsys.readouterr().out


def test_a_reason_shows_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    said = "cannot connect to postgresql://me:hunter2@db/jobs"
    failed = JobView.of(replace(JOB, state="failed", message=said, hint=said))
    render.jobs([failed], False)
    render.ended(failed)
    shown = capsys.readouterr()
    assert "hunter2" not in shown.out + shown.err
    assert shown.out.count("me:") == 2
