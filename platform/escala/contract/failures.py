"""Why an attempt failed, as one of the classes that the retry rule reads (`jobs/state.py`).

What wraps an error on a cluster is taken apart where Ray is known (workloads/training/failures.py).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from escala.contract.errors import EscalaError, FailureKind
from escala.contract.redaction import hide

UNEXPLAINED = (
    "internal",
    "worker_lost",
    "node_lost",
)  # their traceback is logged; others say what is to be done


@dataclass(frozen=True)
class Failure:
    """`kind` as in records.Outcome."""

    kind: FailureKind
    message: str
    hint: str = ""
    exit_code: int = 1


Classify = Callable[[BaseException], Failure]


def classify(error: BaseException) -> Failure:
    """The failure that `error` amounts to where it is not wrapped: our own errors say it themselves."""
    if isinstance(error, EscalaError):
        return Failure(error.kind, error.message, error.hint, error.exit_code)
    return internal(error)


def internal(error: BaseException) -> Failure:
    """A failure that nobody expected."""
    text = hide("".join(traceback.format_exception_only(error)).strip())
    return Failure("internal", text, "the log has the traceback; please report it")
