"""What drafts tokens. A draft follows from the sequence alone, never from the random numbers that draw its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from workloads.generation.scheduler import Sequence


@dataclass(frozen=True)
class Guess:
    """Tokens that may follow a sequence.

    Attributes:
        grades: of each token, how sure the drafter is: a class whose acceptance is measured, any small number.
    """

    tokens: tuple[int, ...]
    grades: tuple[int, ...]


NO_GUESS = Guess((), ())


class Drafter(Protocol):
    """A source of drafts. What it keeps of a sequence it drops when the sequence ends."""

    is_costly: bool
    """Whether a draft takes long beside a step of the engine: then it is made only where it may pay."""

    def begin(self, sequence: Sequence) -> None:
        """A request has come."""
        ...

    def end(self, sequence: Sequence) -> None:
        """It has ended, one way or another."""
        ...

    def guesses(self, sequences: Iterable[tuple[Sequence, int]]) -> Many[Guess]:
        """Of each (sequence, most) a guess of `most` tokens at most, after all of the sequence's tokens."""
        ...
