"""Between engine and drafter: which of the drafted tokens are scored in a step (docs/theory A.9).

What is scored depends on time, which text does not: a drafted token becomes the text's only where it is what would
have been drawn there.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from workloads.generation.scheduler import NO_DRAFTS, Drafts, Sequence
from workloads.generation.speculation.drafter import NO_GUESS, Drafter, Guess
from workloads.generation.speculation.pace import Acceptance, RequestRecord, StepCosts, best_count, best_depth

LEAST = 0.02  # a token with a smaller chance is not considered
IDLE_STEPS = (
    32  # without a draft that pays; then drafts are made, to see whether they would, in one step of REST
)
REST = 8
PROBE = 64  # steps between two drafts of one token by a costly drafter that does not pay
ALL = -1  # the grade of all tokens together


class Speculator:
    """Drafts for an engine's requests, and what is learned of them.

    Args:
        tokens: to draft for one request in one step at most.
    """

    def __init__(self, drafter: Drafter, tokens: int) -> None:
        self._drafter, self._tokens = drafter, tokens
        self._costs, self._acceptance = StepCosts(), Acceptance()
        self._records: dict[Sequence, RequestRecord] = {}
        self._guesses: dict[Sequence, Guess] = {}  # of the present step
        self._step = self._idle = 0
        self._depth, self._draft_seconds = 0, 0.0  # tokens for each request in this step; of one, of late

    def begin(self, sequence: Sequence) -> None:
        """A request has come."""
        self._records[sequence] = RequestRecord()
        self._drafter.begin(sequence)

    def end(self, sequence: Sequence) -> None:
        """It has ended."""
        self._records.pop(sequence, None)
        self._guesses.pop(sequence, None)
        self._drafter.end(sequence)

    def drafts(self, decoding: Many[Sequence], is_mixed: bool = False) -> Drafts:
        """The tokens to be scored in this step, of the requests that are about to get their next one.

        Args:
            is_mixed: prompts are read in the same step, so that its cost will say nothing of its rows'.
        """
        self._guesses = {}
        self._step += 1
        is_known = self._costs.most > 0 if is_mixed else self._costs.knows(len(decoding))
        self._depth = self._deepest(len(decoding), is_known)
        asked = [(s, most) for s in decoding if (most := self._room(s)) > 0]
        if not asked:
            return NO_DRAFTS
        made = self._drafter.guesses(asked)
        self._guesses = {s: guess for (s, _), guess in zip(asked, made, strict=True) if guess is not NO_GUESS}
        if not is_known:
            return NO_DRAFTS
        chosen = self._chosen(len(decoding))
        self._idle = 0 if chosen else self._idle + 1
        return chosen

    def learn(self, sequence: Sequence, tokens: Many[int]) -> None:
        """What a sequence's guess was worth: `tokens` were drawn, the first ones of its draft among them."""
        guess, record = self._guesses.pop(sequence, NO_GUESS), self._records.get(sequence)
        for token, guessed, grade in zip(tokens, guess.tokens, guess.grades, strict=False):
            hit, rate = token == guessed, self._acceptance.rate(grade)
            if record is not None:
                record.tested(rate, hit)
            self._acceptance.tested(grade, hit)
            self._acceptance.tested(ALL, hit)
            if not hit:
                break

    def drafted(self, seconds: float) -> None:
        """The step's drafts took so long."""
        if self._guesses and self._depth:
            each = seconds / self._depth
            self._draft_seconds += (each - self._draft_seconds) * (1 / 8 if self._draft_seconds else 1)

    def measured(self, rows: int, seconds: float) -> None:
        """A step of so many rows, and nothing else, took so long."""
        self._costs.add(rows, seconds)

    def _room(self, sequence: Sequence) -> int:
        """Tokens that it may still use, beside the one that every step gives."""
        return min(self._depth, sequence.request.params.max_tokens - sequence.generated - 1)

    def _deepest(self, base: int, is_known: bool) -> int:
        """How many tokens to draft for each request."""
        if not self._drafter.is_costly:
            rests = self._idle >= IDLE_STEPS and self._step % REST
            return 0 if rests else self._tokens
        if not base or not is_known:
            return 0
        depth = best_depth(self._acceptance.rate(ALL), base, self._costs, self._draft_seconds, self._tokens)
        return depth or int(self._step % PROBE == 0)

    def _chosen(self, base: int) -> Drafts:
        """The tokens with the best chances, as many as pay."""
        chances: list[tuple[float, Sequence]] = []
        rate = self._acceptance.rate
        for sequence, guess in self._guesses.items():
            chance, factor = 1.0, self._records[sequence].factor
            for grade in guess.grades:
                chance *= min(1.0, rate(grade) * factor)
                if chance < LEAST:
                    break
                chances.append((chance, sequence))
        chances.sort(key=lambda each: each[0], reverse=True)
        count = best_count([chance for chance, _ in chances], base, self._costs)
        drafts: dict[Sequence, int] = {}
        for _, sequence in chances[:count]:
            drafts[sequence] = drafts.get(sequence, 0) + 1
        return {sequence: self._guesses[sequence].tokens[:length] for sequence, length in drafts.items()}
