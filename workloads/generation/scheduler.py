"""Which tokens the next step computes, and for whom there are blocks. No tensor here.

1. Every running request whose prompt is computed gets its next token. Where a block is wanted and none is free, the
   request admitted last gives up its blocks, goes to the front of the queue and is computed again later. Drafted
   tokens (docs/theory A.9) go along where blocks are to spare, and take none from anybody.
2. Prompts are read in pieces of whole blocks, `prefill_tokens` a step over all, those already begun first.
3. Then the queue is admitted in order, as long as there is a place, and blocks for the whole of the next one; where
   attention needs the last `live` blocks of a sequence alone, for those.

What a sequence no longer needs is released while it runs: its table keeps the place, as RELEASED. A prompt that is
read meanwhile takes what is free, a block at least, or waits; only the request admitted last reads one.

So that a token's keys and values are the same to the last bit whatever the batch, each position is always computed
in the same way, recomputed or not: a prompt's in tiles of a block, a response's one by one. Blocks are shared only
where they lie in prompts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from types import MappingProxyType

from workloads.generation.blocks import BlockPool, Key, prompt_keys
from workloads.generation.protocol import Request
from workloads.generation.text import TextStream

RELEASED = -1
"""In a table: the block that was here is no longer the sequence's."""
NO_SLOT = -1


@dataclass(eq=False)
class Sequence:
    """An unfinished request.

    Attributes:
        tokens: prompt and response.
        computed: how many positions have their keys and values in `table`'s blocks.
        keys: of the prompt's full blocks.
        released: how many of `table`'s first blocks are.
        slot: its place among those that run, 0 to max_running - 1; NO_SLOT where it does not.
    """

    request: Request
    text: TextStream | None
    keys: list[Key]
    tokens: list[int]
    computed: int = 0
    table: list[int] = field(default_factory=list)
    released: int = 0
    slot: int = NO_SLOT

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def generated(self) -> int:
        """Tokens of the response so far."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class Work:
    """Positions [start, end) of a sequence, and after them those of its `draft`."""

    sequence: Sequence
    start: int
    end: int
    draft: tuple[int, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether it comes to the sequence's last token: the next one can be drawn."""
        return self.end == len(self.sequence.tokens)


Drafts = Mapping[Sequence, Many[int]]
NO_DRAFTS: Drafts = MappingProxyType({})


class Scheduler:
    """The queue, the running requests, their blocks and slots.

    Attributes:
        shares_prefixes: whether prompts share blocks. Not where experts have a capacity: of a prefix that is not
            computed nothing would be counted, and what follows would find other places.
    """

    def __init__(
        self, blocks: int, block_tokens: int, max_running: int, prefill_tokens: int, live: int | None = None
    ) -> None:
        self.pool = BlockPool(blocks)
        self.block_tokens, self.live = block_tokens, live
        self.max_running = max_running  # of which `limit` are admitted
        self.limit = max_running
        self.prefill_tokens = max(prefill_tokens // block_tokens, 1) * block_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of admission
        self.shares_prefixes = True
        self._free_slots = list(range(max_running))
        self.preemptions = 0
        self.cached_tokens = 0

    @property
    def room(self) -> float:
        """Positions that one request may have: of a cache that holds all that is needed at once, any number."""
        total = self.pool.total
        return math.inf if self.live is not None and total >= self.live else total * self.block_tokens

    def add(self, request: Request, text: TextStream | None) -> Sequence:
        """Queue a request."""
        prompt = request.prompt_token_ids
        keys = prompt_keys(prompt, self.block_tokens)
        self.waiting.append(Sequence(request, text, keys, list(prompt)))
        return self.waiting[-1]

    def remove(self, sequence: Sequence) -> None:
        """It has ended, one way or another."""
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    @property
    def decoding(self) -> list[Sequence]:
        """The running requests of which all but the last token is computed."""
        return [s for s in self.running if s.computed == len(s.tokens) - 1 and s.generated]

    @property
    def reads_prompts(self) -> bool:
        """Whether the next step will, as far as that is known before it is planned."""
        has_room = bool(self.waiting) and len(self.running) < self.limit
        return has_room or any(s.computed < s.prompt_length for s in self.running)

    def plan(self, admit: bool, drafts: Drafts = NO_DRAFTS) -> tuple[list[Work], list[Work]]:
        """(pieces of prompts, response tokens) to compute now; the caller does so, and settles the works with drafts,
        before it plans again.

        Args:
            drafts: of some of `decoding`, tokens that may follow their last one.
        """
        rows = self._rows(drafts)
        budget, tiles = self.prefill_tokens, list[Work]()
        for sequence in self.running:
            if sequence.computed < sequence.prompt_length and budget > 0:
                budget = self._read(sequence, budget, tiles)
        while self.waiting and budget > 0 and len(self.running) < self.limit:
            sequence = self.waiting[0]
            if not (admit or sequence.generated) or not self._admit(sequence):
                break
            budget = self._read(sequence, budget, tiles)
        for work in (*tiles, *rows):
            work.sequence.computed = work.end
        return tiles, rows

    def settle(self, work: Work, accepted: int) -> None:
        """Of a work's draft so many tokens were accepted, and are the sequence's now: blocks that only the others had
        are given back. What is computed of the others is written over before it is read.
        """
        sequence = work.sequence
        if not sequence.table:  # it has ended
            return
        sequence.computed += accepted
        for _ in range(len(sequence.table) - -(-sequence.computed // self.block_tokens)):
            self.pool.release(sequence.table.pop())

    def _rows(self, drafts: Drafts) -> list[Work]:
        rows = []
        for sequence in list(self.running):
            if sequence.computed < sequence.prompt_length or sequence not in self.running:
                continue
            self._trim(sequence)
            end = min(len(sequence.tokens), sequence.computed + self.prefill_tokens, self._room(sequence))
            end = max(end, sequence.computed + 1)
            if self._grow(sequence, end):
                draft = drafts.get(sequence, ()) if end == len(sequence.tokens) else ()
                rows.append(Work(sequence, sequence.computed, end, self._fitting(sequence, end, draft)))
        return rows

    def _fitting(self, sequence: Sequence, end: int, draft: Many[int]) -> tuple[int, ...]:
        """So much of a draft as there are blocks for, if that leaves one for each running request, and those of the
        next one where there is a place for it.
        """
        size, kept = self.block_tokens, len(self.running)
        if self.waiting and kept < self.limit:
            kept += -(-len(self.waiting[0].tokens) // size)
        while len(sequence.table) * size < end + len(draft) and self.pool.free > kept:
            self._grow(sequence, (len(sequence.table) + 1) * size)
        return tuple(draft[: len(sequence.table) * size - end])

    def _trim(self, sequence: Sequence) -> None:
        """Release the blocks that its next token does not need."""
        if self.live is None:
            return
        gone = sequence.computed // self.block_tokens + 1 - self.live
        for index in range(sequence.released, gone):
            self.pool.release(sequence.table[index], is_passed=True)
            sequence.table[index] = RELEASED
        sequence.released = max(sequence.released, gone)

    def _room(self, sequence: Sequence) -> int:
        """Up to which position there are blocks."""
        return (len(sequence.table) + self.pool.free) * self.block_tokens

    def _grow(self, sequence: Sequence, end: int) -> bool:
        """Blocks for positions up to `end`, taken from those admitted later if need be; False: it had to go itself."""
        while len(sequence.table) * self.block_tokens < end:
            block = self.pool.take()
            if block is not None:
                sequence.table.append(block)
                continue
            victim = self.running.pop()
            self._release(victim)
            self.waiting.appendleft(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        return True

    def _read(self, sequence: Sequence, budget: int, tiles: list[Work]) -> int:
        """Add the next piece of a prompt, ending on a block's border or with the prompt; its full blocks are published.
        Returns the budget that is left: nothing where there is no block for a piece.

        They may be shared at once: within a step every layer writes its keys before any query reads them.
        """
        self._trim(sequence)
        start, size = sequence.computed, self.block_tokens
        end = min(sequence.prompt_length, start + max(budget // size, 1) * size, self._room(sequence))
        if end <= start:
            return 0
        self._grow(sequence, end)
        full = min(end // size, len(sequence.keys)) if self.shares_prefixes else 0
        for index in range(start // size, full):
            self.pool.publish(sequence.table[index], sequence.keys[index])
        tiles.append(Work(sequence, start, end))
        return budget - (end - start)

    def _admit(self, sequence: Sequence) -> bool:
        """Give it the blocks that it needs at once, shared ones first, if that leaves one for each running request."""
        sharable = (sequence.prompt_length - 1) // self.block_tokens  # the last token's state is wanted
        sharable = sharable if self.shares_prefixes else 0
        live = None if self.live is None else self.live - 1  # beside its next token's
        count, shared = self.pool.known(sequence.keys[:sharable], live)
        wanted = -(-len(sequence.tokens) // self.block_tokens) - count
        if self.live is not None:
            wanted = min(wanted, self.live - len(shared))
        idle = sum(self.pool.owners(block) == 0 for block in shared)
        if self.running and self.pool.free < wanted + idle + len(self.running):
            return False
        if self.pool.free < wanted + idle:
            raise RuntimeError("blocks are owned by nobody who runs: the pool's accounts are wrong")
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.released = count - len(shared)
        sequence.table = [RELEASED] * sequence.released + [self.pool.share(block) for block in shared]
        sequence.computed = count * self.block_tokens
        self.cached_tokens += sequence.computed
        if self.live is None:
            self._grow(sequence, len(sequence.tokens))
        return True

    def _release(self, sequence: Sequence) -> None:
        for block in sequence.table[sequence.released :]:
            self.pool.release(block)
        if sequence.slot != NO_SLOT:
            self._free_slots.append(sequence.slot)
        sequence.table, sequence.computed, sequence.released, sequence.slot = [], 0, 0, NO_SLOT
