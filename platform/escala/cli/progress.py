"""What a long command is doing: nothing for the first ten seconds, then on a terminal a line that is rewritten, with
the time that is left, and elsewhere a line every 15 seconds.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

QUIET_SECONDS, LINE_SECONDS, TERMINAL_SECONDS = 10.0, 15.0, 1.0
COUNTED = re.compile(r"([0-9,]+) of ([0-9,]+)")


class Waiting:
    """A context in which `report(text)` says what is being done. `write` gets the lines (no newline at their end)."""

    def __init__(
        self,
        write: Callable[[str], None],
        terminal: bool | None = None,
        quiet_seconds: float = QUIET_SECONDS,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        self._write = write
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._quiet, self._every = quiet_seconds, TERMINAL_SECONDS if self._terminal else line_seconds
        self._text, self._began, self._phase = "", time.monotonic(), time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="escala-progress", daemon=True)

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def report(self, text: str) -> None:
        """What is being done from now on; `3 of 10 ...` has a time left."""
        if not COUNTED.match(text) or not COUNTED.match(self._text):
            self._phase = time.monotonic()
        self._text = text

    def line(self) -> str:
        """What is said now."""
        spent = time.monotonic() - self._began
        return f"{self._text or 'working'}: {spent:.0f} s{self._left()}"

    def _left(self) -> str:
        found = COUNTED.match(self._text)
        if found is None:
            return ""
        done, total = (int(text.replace(",", "")) for text in found.groups())
        if not 0 < done <= total:
            return ""
        return f", about {(time.monotonic() - self._phase) / done * (total - done):.0f} s left"

    def _run(self) -> None:
        shown, wait = False, self._quiet
        while not self._ended.wait(wait):
            self._write(f"\r\x1b[K{self.line()}" if self._terminal else self.line() + "\n")
            shown, wait = True, self._every
        if shown and self._terminal:
            self._write("\r\x1b[K")
