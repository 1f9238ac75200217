"""What every entry point shares: its spec, the fence, requests to stop, and its one last word, the outcome.

An entry point is started as `python -m MODULE ATTEMPT.json`. It writes `outcome.json` last; whoever finds
none knows that the driver was lost.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from escala.contract.errors import SpecError, Superseded
from escala.contract.files import forgive_full_log, insist
from escala.contract.records import (
    STOP_REASONS,
    AttemptFiles,
    AttemptSpec,
    Control,
    Outcome,
    load_record,
    read_record,
    write_json,
)


def read_attempt(arguments: list[str]) -> AttemptSpec:
    """The spec at the path that is the only command-line argument. Raises SpecError.

    From here on a full disk takes lines of this process's log, and not the process.
    """
    forgive_full_log()
    if len(arguments) != 1:
        raise SpecError(f"expected one argument, the path of attempt.json; got {len(arguments)}")
    try:
        return load_record(AttemptSpec, Path(arguments[0]))
    except FileNotFoundError as error:
        raise SpecError(
            f"{arguments[0]} does not exist", "start workloads by `escala submit`, which writes it"
        ) from error
    except (OSError, ValueError) as error:
        raise SpecError(f"{arguments[0]} is not an attempt's spec: {error}") from error


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted keys and texts, for the tracker's parameters; lists as JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list) else str(value)
    return flat


def check_fence(files: AttemptFiles, attempt: int) -> None:
    """Raise Superseded where another attempt than `attempt` may write now. A fence that is missing, or damaged
    and names no attempt, forbids nothing; the reconcile loop writes it again.
    """
    try:
        current = files.current.read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return
    if current.isdecimal() and current != str(attempt):
        raise Superseded(f"attempt {attempt} was declared lost; attempt {current} has the job now")


def request_stop(files: AttemptFiles, reason: str) -> None:
    """Ask the running attempt to stop at its next step, unless somebody asked before; waits for room on a full
    disk.
    """
    if not files.control.exists():
        insist(lambda: write_json(files.control, Control(reason)), "the request to stop")


def stop_on_sigterm(files: AttemptFiles) -> None:
    """Make SIGTERM a request to write a checkpoint and stop. Call it after ray.init, which installs its own
    handler.
    """

    def handler(_signal: int, _frame: FrameType | None) -> None:
        threading.Thread(target=request_stop, args=(files, "preempted"), daemon=True).start()  # it may wait
        print("SIGTERM: stopping after this step, with a checkpoint", file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, handler)


class Watch:
    """Rank 0's eye on the outside between two steps: the fence, the control file, the budget."""

    def __init__(self, spec: AttemptSpec) -> None:
        self.spec = spec
        self.files = AttemptFiles(spec.directory)
        self.started = time.monotonic()

    def poll(self, spent_flops: float, next_flops: float) -> str | None:
        """Why to stop before a step of `next_flops`: one of STOP_REASONS, "superseded", or None to go on."""
        try:
            check_fence(self.files, self.spec.attempt)
        except Superseded:
            return "superseded"
        if self.files.control.exists():
            control = read_record(Control, self.files.control)
            if control is not None and control.stop in STOP_REASONS:
                return control.stop
        flops, seconds = self.spec.remaining_flops, self.spec.remaining_seconds
        if flops is not None and spent_flops + next_flops > flops:
            return "budget"
        if seconds is not None and time.monotonic() - self.started >= seconds:
            return "budget"
        return None


def finish(spec: AttemptSpec, outcome: Outcome) -> None:
    """Write the outcome, the last thing that an attempt does; waits for room on a full disk."""
    files = AttemptFiles(spec.directory)
    insist(lambda: write_json(files.outcome, outcome), "the attempt's outcome")
    print(f"escala: attempt {spec.attempt} of {spec.job_id}: {outcome.kind}", flush=True)
    if outcome.message:
        print(
            outcome.message + (f"\n  hint: {outcome.hint}" if outcome.hint else ""),
            file=sys.stderr,
            flush=True,
        )
