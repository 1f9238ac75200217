"""Drafts from this prompt's other responses: those of earlier passes over the prompts, and those that run now.

A prompt's responses are counted as n-grams: after the longest of the last tokens that was seen, the draft is what
followed it most often. At temperature 1 that is the most probable token of the policy that wrote them, so its share
of the counts says about how often it will be accepted. The responses themselves are kept, in bounded memory; their
counts only while a request with the prompt is unfinished.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as Many

from workloads.generation.scheduler import Sequence
from workloads.generation.speculation.drafter import Guess

ORDERS = (8, 4, 2)  # the n of n-grams, longest first
SHARES = 8  # grades of one order, by the share of the counts
RESPONSES, RESPONSE_TOKENS = (
    32,
    1 << 13,
)  # of a prompt, the newest: counting 8,192 tokens takes about 10 MB and 20 ms
TOKENS = (
    1 << 20
)  # of all responses together, 4 bytes each; the prompts that were asked for longest ago go first


class HistoryDrafter:
    """`draft: history`.

    Args:
        responses, tokens: that are kept, of a prompt and of all.
    """

    is_costly = False

    def __init__(self, responses: int = RESPONSES, tokens: int = TOKENS) -> None:
        self._responses, self._tokens = responses, tokens
        self._kept: OrderedDict[bytes, deque[array[int]]] = OrderedDict()  # the prompt asked for last is last
        self._total = 0  # tokens kept
        self._counts: dict[bytes, _Counts] = {}  # of the prompts of unfinished requests
        self._live: dict[Sequence, _Live] = {}

    def begin(self, sequence: Sequence) -> None:
        """See Drafter: nothing before it runs."""

    def end(self, sequence: Sequence) -> None:
        """See Drafter."""
        live = self._live.pop(sequence, None)
        if live is not None:
            live.count(sequence)
            live.counts.users -= 1
            if not live.counts.users:
                del self._counts[live.key]
        if sequence.generated:
            key = _key_of(sequence) if live is None else live.key
            self._keep(key, array("i", sequence.tokens[sequence.prompt_length :]))

    def guesses(self, sequences: Iterable[tuple[Sequence, int]]) -> Many[Guess]:
        """See Drafter."""
        asked = [(s, most, self._live.get(s) or self._joined(s)) for s, most in sequences]
        for sequence, _, live in asked:
            live.count(sequence)
        return [live.counts.guess(sequence.tokens[-ORDERS[0] :], most) for sequence, most, live in asked]

    def _joined(self, sequence: Sequence) -> _Live:
        """A request that runs now: its prompt's responses are counted, unless they are already."""
        key = _key_of(sequence)
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = _Counts()
            before = sequence.request.prompt_token_ids[-ORDERS[0] :]
            for response in self._kept.get(key, ()):
                counts.add([*before, *response], len(before))
        counts.users += 1
        live = self._live[sequence] = _Live(key, counts, sequence.prompt_length)
        return live

    def _keep(self, key: bytes, response: array[int]) -> None:
        kept = self._kept.setdefault(key, deque())
        self._kept.move_to_end(key)
        kept.append(response)
        self._total += len(response)
        while len(kept) > self._responses or (len(kept) > 1 and sum(map(len, kept)) > RESPONSE_TOKENS):
            self._total -= len(kept.popleft())
        while self._total > self._tokens:
            _, oldest = self._kept.popitem(last=False)
            self._total -= sum(map(len, oldest))


def _key_of(sequence: Sequence) -> bytes:
    return hashlib.blake2b(array("q", sequence.request.prompt_token_ids).tobytes(), digest_size=16).digest()


class _Counts:
    """What followed each n-gram of a prompt's responses, and how often. At a text's beginning n-grams are shorter.

    Attributes:
        users: unfinished requests.
    """

    def __init__(self) -> None:
        self.users = 0
        self._after: dict[tuple[int, ...], dict[int, int]] = {}

    def add(self, tokens: Many[int], start: int) -> None:
        """Count the tokens from `start` on."""
        after = self._after
        for place in range(start, len(tokens)):
            token = tokens[place]
            for order in ORDERS:
                counts = after.setdefault(tuple(tokens[max(0, place - order) : place]), {})
                counts[token] = counts.get(token, 0) + 1

    def guess(self, tokens: list[int], most: int) -> Guess:
        """What most often followed, token after token; `tokens` are the last ones."""
        found, grades = list[int](), list[int]()
        while len(found) < most:
            best = self._best(tokens)
            if best is None:
                break
            tokens = [*tokens[1 - ORDERS[0] :], best[0]]
            found.append(best[0])
            grades.append(best[1])
        return Guess(tuple(found), tuple(grades))

    def _best(self, tokens: list[int]) -> tuple[int, int] | None:
        """(token, grade) of what most often followed the longest n-gram that is known."""
        for place, order in enumerate(ORDERS):
            counts = self._after.get(tuple(tokens[-order:]))
            if counts:
                token = max(counts, key=counts.__getitem__)
                share = counts[token] / sum(counts.values())
                return token, place * SHARES + min(int(share * SHARES), SHARES - 1)
        return None


class _Live:
    """An unfinished request's place in its prompt's counts."""

    def __init__(self, key: bytes, counts: _Counts, counted: int) -> None:
        self.key, self.counts, self._counted = key, counts, counted

    def count(self, sequence: Sequence) -> None:
        """Its new tokens."""
        self.counts.add(sequence.tokens, self._counted)
        self._counted = len(sequence.tokens)
