"""A JobBackend in this process's memory: nothing runs, and the test says how each attempt goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

from escala.contract.errors import ClusterError
from escala.jobs.backends.base import Status, Submission


@dataclass
class MemoryBackend:
    """`up`: whether it answers."""

    up: bool = True
    drivers: dict[str, Status] = field(default_factory=dict)  # by submission id
    submissions: list[str] = field(default_factory=list)  # those that started something
    stopped: list[str] = field(default_factory=list)

    def reachable(self) -> bool:
        """See JobBackend."""
        return self.up

    def submit(self, submission: Submission) -> None:
        """See JobBackend."""
        self._answer()
        if submission.id not in self.drivers:
            self.submissions.append(submission.id)
            self.drivers[submission.id] = "pending"

    def status(self, submission_id: str) -> Status:
        """See JobBackend."""
        self._answer()
        return self.drivers.get(submission_id, "absent")

    def stop(self, submission_id: str) -> None:
        """See JobBackend."""
        self._answer()
        if self.drivers.get(submission_id) in ("pending", "running"):
            self.stopped.append(submission_id)
            self.drivers[submission_id] = "ended"

    def restart(self) -> None:
        """It ends with all that it knew; the next one knows nothing."""
        self.drivers.clear()

    def _answer(self) -> None:
        if not self.up:
            raise ClusterError("the head is away")
