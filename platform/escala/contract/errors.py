"""One error tree. A user's error says what happened, why, and how to fix it.

Every error carries a `message` (what and why), a `hint` (how to fix it) and an exit code; the CLI prints both and
exits with the code. `kind` is the failure class that the retry rule reads (see `jobs/state.py`).
"""

from __future__ import annotations

from typing import Literal

from escala.contract.redaction import hide

FailureKind = Literal[
    "user_error",  # of every error below that names no other
    "out_of_memory",
    "diverged",
    "worker_lost",
    "node_lost",
    "driver_lost",
    "superseded",
    "internal",
]


class EscalaError(Exception):
    """Base of every error that escala raises on purpose.

    Args:
        message: what happened and why, one or two plain sentences.
        hint: how to fix it; empty when nothing can be done.
    """

    exit_code = 1
    kind: FailureKind = "user_error"

    def __init__(self, message: str, hint: str = "") -> None:
        message, hint = hide(message), hide(hint)
        super().__init__(message, hint)  # both arguments, so that pickling through Ray keeps them
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class SpecError(EscalaError):
    """A job, sweep or cluster spec that does not validate: unknown key, wrong type, impossible value."""

    exit_code = 2


class DataError(EscalaError):
    """Training data that cannot be used: empty, unreadable, too few tokens, a vocabulary that does not fit."""

    exit_code = 3


class CheckpointError(EscalaError):
    """A checkpoint that is corrupt, partial, or does not fit the model."""

    exit_code = 4


class ClusterError(EscalaError):
    """The cluster (Ray head, tracker, runner) cannot be started or reached."""

    exit_code = 5


class NotFoundError(EscalaError):
    """A job, run, law or file that does not exist."""

    exit_code = 6


class StateError(EscalaError):
    """An action that the present state of a job forbids (to stop a finished job, to retry a running one)."""

    exit_code = 7


class VersionError(EscalaError):
    """Versions that do not fit together: of client and cluster, or of what is read and who reads it."""

    exit_code = 8


class OutOfMemory(EscalaError):
    """A process ran out of memory, on the device or by the kernel's hand. Not retried."""

    exit_code = 9
    kind: FailureKind = "out_of_memory"


class Diverged(EscalaError):
    """The loss or the gradient is not finite. The step is named. Not retried."""

    exit_code = 10
    kind: FailureKind = "diverged"


class Superseded(EscalaError):
    """This attempt was declared lost and another one has taken the job over: stop without writing."""

    exit_code = 11
    kind: FailureKind = "superseded"


class LawError(EscalaError):
    """A law that cannot be fitted, or a question that it cannot answer: unknown form, missing column or bound."""

    exit_code = 12


class StaleWeights(EscalaError):
    """Weights older than what was asked for, or a version that is not newer than the published one."""

    exit_code = 13


class WeightsNotLoaded(EscalaError):
    """Replicas that did not take a published version, or a version whose weights cannot be had any more."""

    exit_code = 14


class DigestMismatch(EscalaError):
    """Weights that are not those that were published: their digest differs."""

    exit_code = 15


class ToleranceNotMet(EscalaError):
    """No model that was tried is as close to another one as was asked for."""

    exit_code = 16
