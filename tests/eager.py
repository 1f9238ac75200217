"""A speculator that scores every drafted token, whatever it costs: what is scored does not depend on time."""

from __future__ import annotations

from collections.abc import Sequence as Many

from workloads.generation.scheduler import Drafts, Sequence
from workloads.generation.speculation.drafter import NO_GUESS
from workloads.generation.speculation.speculator import Speculator


class Eager(Speculator):
    def drafts(self, decoding: Many[Sequence], is_mixed: bool = False) -> Drafts:
        self._depth = self._tokens
        asked = [(s, most) for s in decoding if (most := self._room(s)) > 0]
        made = self._drafter.guesses(asked)
        return {s: guess.tokens for (s, _), guess in zip(asked, made, strict=True) if guess is not NO_GUESS}
