"""Drafts from a small model that continues the text greedily, over a paged cache of its own.

What it computed of tokens that were not accepted is written over: a sequence goes on from the tokens that its text and
the draft have in common. Its bits matter to nobody, so a prompt may be read with or without neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch

from escala.schema.speculation import DRAFT_TOKENS
from workloads.generation.blocks import BlockPool
from workloads.generation.network import Network, TokenSpan
from workloads.generation.scheduler import Sequence
from workloads.generation.speculation.drafter import NO_GUESS, Guess
from workloads.model.transformer import Transformer

CACHE_BYTES, BLOCK_TOKENS = 1 << 28, 32
GRADES = 16  # by the probability of the most probable token
LEAST = 0.1  # a draft ends where the product of these is smaller


@dataclass(eq=False)
class _Drafted:
    """What the draft model knows of a sequence: keys and values of `fed` in the blocks of `table`."""

    fed: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Draft:
    """A guess in the making: `new` tokens are to be computed next; `chance` is that of all its tokens together."""

    state: _Drafted
    new: list[int]
    most: int
    tokens: list[int] = field(default_factory=list)
    grades: list[int] = field(default_factory=list)
    chance: float = 1.0

    def add(self, token: int, chance: float) -> None:
        """The most probable one after `new`, which is computed now. Not finite: it ends here."""
        self.state.fed += self.new
        if not math.isfinite(chance):
            self.most = 0
            return
        self.new, self.chance = [token], self.chance * chance
        self.tokens.append(token)
        self.grades.append(min(int(chance * GRADES), GRADES - 1))


class ModelDrafter:
    """`draft: PATH`.

    Args:
        model: on its device and in its dtype; the drafter makes it its own.
        sequences: whose whole contexts the cache holds, or what fits into CACHE_BYTES. One for which there is no block
            left gets no draft.
    """

    is_costly = True

    def __init__(self, model: Transformer, sequences: int) -> None:
        config, self._network = model.config, Network(model)
        self._context = config.max_context_tokens
        self._block_tokens = config.attention.block_tokens(config) or BLOCK_TOKENS
        item = self._network.like.element_size()
        fitting = CACHE_BYTES // config.attention.block_bytes(config, self._block_tokens, item)
        blocks = max(1, min(sequences * -(-self._context // self._block_tokens), fitting))
        self._pool = BlockPool(blocks)
        self._cache = self._network.decode_state(blocks, self._block_tokens)
        self._states: dict[Sequence, _Drafted] = {}

    def begin(self, sequence: Sequence) -> None:
        """See Drafter."""
        self._states[sequence] = _Drafted()

    def end(self, sequence: Sequence) -> None:
        """See Drafter."""
        state = self._states.pop(sequence, None)
        for block in () if state is None else state.table:
            self._pool.release(block)

    def guesses(self, sequences: Iterable[tuple[Sequence, int]]) -> Many[Guess]:
        """See Drafter."""
        drafts = [self._begun(sequence, most) for sequence, most in sequences]
        going = [draft for draft in drafts if draft.most > 0]
        with torch.inference_mode():
            while going:
                self._next(going)
                going = [d for d in going if len(d.tokens) < d.most and d.chance >= LEAST]
        return [Guess(tuple(d.tokens), tuple(d.grades)) if d.tokens else NO_GUESS for d in drafts]

    def _begun(self, sequence: Sequence, most: int) -> _Draft:
        """A draft with blocks for all of its tokens; one of none where there is no block left."""
        state, tokens = self._states[sequence], sequence.tokens
        most = min(most, self._context - len(tokens))
        while most > 0 and len(state.table) * self._block_tokens < len(tokens) + most:
            block = self._pool.take()
            if block is None:
                return _Draft(state, [], 0)
            state.table.append(block)
        del state.fed[_common(state.fed, tokens, len(tokens) - 1) :]
        return _Draft(state, tokens[len(state.fed) :], most)

    def _next(self, drafts: Many[_Draft]) -> None:
        """One more token of each."""
        whole, rows = [d for d in drafts if not d.state.fed], [d for d in drafts if d.state.fed]
        parts = [
            self._network.forward(
                [TokenSpan(d.new, len(d.state.fed), d.state.table) for d in some], self._cache, tiled
            )
            for some, tiled in ((whole, True), (rows, False))
            if some
        ]
        logits_NV = self._network.logits(torch.cat(parts))
        top_N, token_N = logits_NV.max(-1)
        chances = (top_N - logits_NV.logsumexp(-1)).exp().tolist()
        for draft, token, chance in zip([*whole, *rows], token_N.tolist(), chances, strict=True):
            draft.add(token, chance)


def _common(fed: Many[int], tokens: Many[int], most: int) -> int:
    """How many of the first `most` tokens are the same. All but the last ones are, so it looks from the end."""
    most = min(most, len(fed))
    low = max(0, most - DRAFT_TOKENS - 1)  # what is older was the sequence's own when it was drafted for
    return next((i for i in range(low, most) if fed[i] != tokens[i]), most)
