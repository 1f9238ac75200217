"""What goes on, while it goes on: one line that is kept up to date on a terminal; elsewhere a line every 15 seconds.

Everything here writes to stderr. `working` is for whatever takes over ten seconds, `follow` for a job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from escala.cli import render
from escala.contract.errors import EscalaError
from escala.report import silent

if TYPE_CHECKING:
    from escala.views.jobs import JobView, ProgressView, WatchedJobView

EVERY_SECONDS = 15.0  # between two lines where there is no terminal
SHOW_AFTER_SECONDS = 1.0  # what is over before leaves no trace on a terminal
BAR_CHARACTERS = 24


class Working:
    """What is being done, how far it is; `working` shows it. Any thread may write.

    Args:
        what: what is being done, a few words.
        clock: seconds.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self.facts = what, ""
        self.done: float | None = None
        self.total: float | None = None
        self._left: float | None = None
        self._clock, self._begun = clock, clock()
        self._told = self._begun  # when `_left` was said

    def update(
        self,
        *,
        what: str | None = None,
        done: float | None = None,
        total: float | None = None,
        facts: str | None = None,
        left_seconds: float | None = None,
    ) -> None:
        """Say how far it is; what is not given stays.

        Args:
            done, total: in any unit; from both follows the time left, unless `left_seconds` is given.
            facts: anything else, on the same line.
        """
        self.what = self.what if what is None else what
        self.facts = self.facts if facts is None else facts
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        if left_seconds is not None:
            self._left, self._told = left_seconds, self._clock()

    def forget(self) -> None:
        """How far it is is not known any more: something new begins."""
        self.done = self.total = self._left = None

    def say(self, text: str) -> None:
        """A line that stays, as `render.note`; use it as the `report` of a method of `Escala`."""
        render.note(text)

    @property
    def elapsed_seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._begun

    @property
    def left_seconds(self) -> float | None:
        """Until the end, as was said or as follows from the pace so far; None where neither is known."""
        if self._left is not None:
            return max(0.0, self._left - (self._clock() - self._told))
        if not self.done or self.total is None:
            return None
        return max(0.0, self.elapsed_seconds / self.done * (self.total - self.done))

    def line(self) -> str:
        """All of it: "running: 12/60, 24 s, 1 min 36 s left, loss 4.12"."""
        parts = [render.duration(self.elapsed_seconds)]
        if self.total is not None:
            parts.insert(0, f"{render.number(self.done or 0)}/{render.number(self.total)}")
        if self.left_seconds is not None:
            parts.append(f"{render.duration(self.left_seconds)} left")
        if self.facts:
            parts.append(self.facts)
        return f"{self.what}: {', '.join(parts)}"

    def bar(self) -> str:
        """The part that is done, as a bar; empty where the total is not known."""
        if not self.total:
            return ""
        full = round(BAR_CHARACTERS * min(1.0, (self.done or 0) / self.total))
        return "━" * full + "╌" * (BAR_CHARACTERS - full) + " "


@contextmanager
def working(what: str, quiet: bool = False) -> Iterator[Working]:
    """Show that `what` is being done for as long as the context lasts, also while its code waits for something.

    Args:
        quiet: show nothing, for `--json`.
    """
    now = Working(what)
    if quiet:
        yield now
    elif render.is_terminal():
        with _live(now):
            yield now
    else:
        with _lines(now):
            yield now


@contextmanager
def reporting(what: str, json: bool) -> Iterator[Callable[[str], None]]:
    """`working` around a call of `Escala`; yields what to give it as `report`, which is silent with `--json`."""
    with working(what, quiet=json) as now:
        yield silent if json else now.say


@contextmanager
def _live(now: Working) -> Iterator[None]:
    from rich.live import Live
    from rich.text import Text

    def shown() -> Text:
        if now.elapsed_seconds < SHOW_AFTER_SECONDS:
            return Text("")
        return Text(now.bar() + now.line(), no_wrap=True, overflow="ellipsis")

    with Live(get_renderable=shown, console=render.err_console, refresh_per_second=4, transient=True):
        yield


@contextmanager
def _lines(now: Working) -> Iterator[None]:
    over = threading.Event()

    def tell() -> None:
        while not over.wait(EVERY_SECONDS):
            render.note(now.line())

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def follow(states: Iterable[WatchedJobView], json: bool = False) -> JobView:
    """Progress over the states of a job as they come, then how it ended, with the whole reason; returns the last."""
    last: WatchedJobView | None = None
    first: ProgressView | None = None  # of this attempt that we saw: the pace counts from there
    with working("queued") as now:
        for watched in states:
            if last is not None and last.job.state != watched.job.state and not render.is_terminal():
                render.note(f"{watched.job.id} is {watched.job.state}")
            last, progress = watched, watched.progress
            if first is None or progress is None or progress.wall_seconds < first.wall_seconds:
                first = progress
            _show(now, watched, first)
    if last is None:
        raise EscalaError("the job vanished while it was followed", "escala ps --all")
    render.ended(last.job, json)
    return last.job


def _show(now: Working, watched: WatchedJobView, first: ProgressView | None) -> None:
    what, progress = f"{watched.job.id} {watched.job.state}", watched.progress
    if progress is None or first is None:
        now.forget()
        now.update(what=what, facts=watched.doing)
        return
    now.update(
        what=what,
        done=progress.step,
        total=progress.total_steps,
        facts=_facts(progress),
        left_seconds=_left_seconds(progress, first),
    )


def _left_seconds(progress: ProgressView, first: ProgressView) -> float | None:
    """At the pace since `first`: an attempt that goes on from a checkpoint did not make all its steps itself."""
    if progress.remaining_seconds is not None or not progress.step or not progress.wall_seconds:
        return progress.remaining_seconds
    steps, seconds = progress.step - first.step, progress.wall_seconds - first.wall_seconds
    if steps <= 0:
        steps, seconds = progress.step, progress.wall_seconds
    return seconds / steps * (progress.total_steps - progress.step)


def _facts(progress: ProgressView) -> str:
    parts = []
    if progress.loss_nats is not None:
        parts.append(f"loss {progress.loss_nats:.3f}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.model_flops_utilization is not None:
        parts.append(f"MFU {progress.model_flops_utilization:.0%}")
    return ", ".join(parts)
