"""What a long command says while it works."""

from __future__ import annotations

import threading

import pytest

from escala.cli.progress import Waiting


def test_a_short_command_says_nothing() -> None:
    said: list[str] = []
    with Waiting(said.append, terminal=False) as wait:
        wait.report("fitting")
    assert said == []


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_one_says_what_it_does_and_how_long_it_takes(terminal: bool) -> None:
    said, enough = list[str](), threading.Event()

    def write(text: str) -> None:
        said.append(text)
        if len(said) >= 2 - terminal:
            enough.set()

    with Waiting(write, terminal=terminal, quiet_seconds=0.01, line_seconds=0.01) as wait:
        wait.report("240 of 1,000 bootstrap replicates")
        assert enough.wait(20)
    if terminal:
        assert said[0].startswith("\r\x1b[K240 of 1,000")
        assert said[-1] == "\r\x1b[K"
    else:
        assert all(line.endswith("\n") for line in said)
    assert " s left" in said[0]


def test_no_time_is_left_of_what_is_not_counted() -> None:
    wait = Waiting(print)
    wait.report("storing the law in the tracker")
    assert wait.line() == "storing the law in the tracker: 0 s"
