"""The protocol of a place where attempts run, and what it is given. Every implementation passes
tests/contracts/test_job_backends.py.

Submission ids are deterministic (JOB-ATTEMPT), so that asking twice starts once. A backend keeps nothing that the job
database needs: it may forget an attempt, and the reconcile loop then reads from the attempt's own files what became of
it. Output goes to the attempt's log, not to the backend; which node failed, the driver itself finds out.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Status = Literal["absent", "pending", "running", "ended"]


@dataclass(frozen=True)
class Submission:
    """An attempt as a backend starts it: `python -u -m ENTRY_POINT SPEC`, its output appended to LOG."""

    id: str  # JOB-ATTEMPT
    entry_point: str  # a module
    spec: Path  # of the attempt: the module's only argument
    log: Path
    variables: Mapping[str, str] = field(default_factory=dict)  # of its environment
    labels: Mapping[str, str] = field(default_factory=dict)  # for who looks at the backend's own pages

    def command(self, python: str = sys.executable) -> str:
        """As a shell command. Our own log outlives the backend, whose output only names it."""
        words = " ".join(shlex.quote(w) for w in (python, "-u", "-m", self.entry_point, str(self.spec)))
        return (
            f"echo {shlex.quote(f'the log is {self.log}')}; exec {words} >> {shlex.quote(str(self.log))} 2>&1"
        )


class JobBackend(Protocol):
    """Starts an attempt under an id, at most once. All but `reachable` raise ClusterError where it does not answer."""

    def reachable(self) -> bool:
        """Whether it answers now."""
        ...

    def submit(self, submission: Submission) -> None:
        """Start the attempt, unless it has the id already."""
        ...

    def status(self, submission_id: str) -> Status:
        """ "absent": it has never heard of the id, or has been restarted since."""
        ...

    def stop(self, submission_id: str) -> None:
        """End the attempt's driver: SIGTERM, then SIGKILL. Nothing happens if it is absent or has ended."""
        ...
