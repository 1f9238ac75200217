"""What a person sees while something takes long: elapsed and left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import pytest
from rich.console import Console

from escala.cli import progress, render
from escala.contract.records import Progress
from tests.conftest import wait_for

AT_WORK = Progress(12, 60, 6144, 1e9, 24.0, 4.125, 256.0, 0.31, 0.0)


@dataclass(frozen=True)
class SomeJob:
    """The fields of a job that are shown."""

    id: str = "j1"
    name: str = "some"
    state: str = "running"
    reason: str | None = None
    message: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Seen:
    """As WatchedJobView."""

    job: SomeJob
    progress: Progress | None
    doing: str = "the last line of the log"


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where progress goes: no terminal, and a line every few milliseconds."""
    written = io.StringIO()
    monkeypatch.setattr(render, "err_console", Console(file=written, soft_wrap=True, highlight=False))
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.005)
    return written


def test_the_line_says_how_far_how_long_and_how_long_yet() -> None:
    now = 0.0
    working = progress.Working("fitting", lambda: now)
    now = 24.0
    assert working.line() == "fitting: 24 s"
    working.update(done=12, total=60, facts="loss 4.125")
    assert working.line() == "fitting: 12/60, 24 s, 1 min 36 s left, loss 4.125"
    working.update(left_seconds=30.0)
    now = 34.0
    assert working.left_seconds == 20.0
    assert working.bar().count("━") == round(progress.BAR_CHARACTERS / 5)
    working.forget()
    assert working.line() == "fitting: 34 s, loss 4.125"


def test_elsewhere_than_on_a_terminal_a_line_comes_while_the_code_waits(stderr: io.StringIO) -> None:
    with progress.working("starting the cluster"):
        wait_for(lambda: stderr.getvalue().count("starting the cluster: ") >= 2, 10, "two lines", every=0.01)
    before = stderr.getvalue()
    assert "\x1b" not in before
    assert stderr.getvalue() == before  # its thread has ended


def test_json_is_quiet_and_what_is_raised_passes(stderr: io.StringIO) -> None:
    def raising() -> None:
        with progress.reporting("x", json=True) as report:
            report("not said")
            raise ValueError("passes")

    with pytest.raises(ValueError, match="passes"):
        raising()
    assert stderr.getvalue() == ""


def test_a_terminal_shows_one_line_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    monkeypatch.setattr(render, "err_console", console)
    monkeypatch.setattr(progress, "SHOW_AFTER_SECONDS", 0.0)
    with progress.working("training") as now:
        now.update(done=1, total=4, left_seconds=90.0)
        wait_for(lambda: " left" in written.getvalue(), 10, "the line is drawn", every=0.01)


def test_following_shows_what_is_done_before_the_first_step_and_the_whole_reason_at_the_end(
    stderr: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "the 17th part of data/train.jsonl:4 is no text: " + "x" * 300
    failed = SomeJob(state="failed", reason="user_error", message=reason, hint="correct the line")

    def states():
        yield Seen(SomeJob(state="starting"), None, "building the tokenizer")
        wait_for(lambda: "building the tokenizer" in stderr.getvalue(), 10, "a line", every=0.01)
        yield Seen(SomeJob(), AT_WORK)
        wait_for(lambda: "12/60" in stderr.getvalue(), 10, "a line", every=0.01)
        yield Seen(failed, AT_WORK)

    assert progress.follow(states()) == failed
    said = stderr.getvalue()
    assert " s left, loss 4.125" in said
    assert "loss 4.125, 256 tok/s, MFU 31%" in said
    assert said.count("j1 is running") == 1
    assert f"failed: {reason}\nhint: correct the line\n" in said
    assert capsys.readouterr().out == "j1  some  failed (user_error)\n"


def test_an_attempt_that_goes_on_from_a_checkpoint_counts_its_own_pace() -> None:
    first = replace(AT_WORK, step=41, wall_seconds=1.0)  # resumed at step 40
    later = replace(AT_WORK, step=51, wall_seconds=11.0)
    assert progress._left_seconds(later, first) == pytest.approx(9.0)
    assert progress._left_seconds(replace(later, remaining_seconds=5.0), first) == 5.0
