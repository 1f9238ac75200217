"""Drafts from the text itself: what followed its last tokens when they stood there before (prompt lookup; Saxena 2023).

An n-gram's place is kept for several n. The longest that is found again gives the draft; how far the two places agree
grades it.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many

from workloads.generation.scheduler import Sequence
from workloads.generation.speculation.drafter import NO_GUESS, Guess

ORDERS = (5, 3, 2)  # the n of n-grams, longest first
FARTHEST = 16  # tokens before two places that are compared, and the largest grade


class NgramDrafter:
    """`draft: ngram`."""

    is_costly = False

    def __init__(self) -> None:
        self._indices: dict[Sequence, _Index] = {}

    def begin(self, sequence: Sequence) -> None:
        """See Drafter."""
        self._indices[sequence] = _Index(sequence.tokens)

    def end(self, sequence: Sequence) -> None:
        """See Drafter."""
        self._indices.pop(sequence, None)

    def guesses(self, sequences: Iterable[tuple[Sequence, int]]) -> Many[Guess]:
        """See Drafter."""
        return [self._indices[sequence].guess(most) for sequence, most in sequences]


class _Index:
    """Where each n-gram of a growing text ended last, but for the one at its end."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens  # the sequence's own list, which grows
        self._ends: dict[int, dict[tuple[int, ...], int]] = {order: {} for order in ORDERS}
        self._known = 0  # places before this one are in `_ends`

    def guess(self, most: int) -> Guess:
        """What followed the longest n-gram that stood before; a copy that reaches the text's end goes on in itself."""
        tokens = self._tokens
        self._read()
        for order in ORDERS:
            place = self._ends[order].get(tuple(tokens[-order:]))
            if place is not None:
                period = len(tokens) - place
                found = tokens[place : place + most]
                while len(found) < most:
                    found.append(found[-period] if len(found) >= period else tokens[place + len(found)])
                length = self._agreement(place, order)
                return Guess(tuple(found), tuple(min(length + i, FARTHEST) for i in range(most)))
        return NO_GUESS

    def _read(self) -> None:
        tokens, last = self._tokens, len(self._tokens)
        for order, ends in self._ends.items():
            for place in range(max(self._known, order), last):
                ends[tuple(tokens[place - order : place])] = place
        self._known = last

    def _agreement(self, place: int, least: int) -> int:
        """How many tokens before `place` are those before the end."""
        tokens, length = self._tokens, least
        while length < min(place, FARTHEST) and tokens[place - length - 1] == tokens[-length - 1]:
            length += 1
        return length
