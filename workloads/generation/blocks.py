"""Who owns which block of the cache: reference counts, and full prompt blocks shared by content. No tensor here.

A block holds what attention keeps of `block_tokens` positions in every layer. Its key is a hash over all tokens up to
its end, so equal keys mean equal contents (Kwon et al. 2023, section 4.3). Nobody's blocks keep their contents until
they are needed for something else. The lowest number goes first: that keeps the used part of the cache compact, which
attention reads as one view. Then go, the longest idle first, prompt blocks that a running sequence left behind, and
last those that were ever shared; so a prompt that nobody shared while it ran is soon overwritten.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Key = bytes


def prompt_keys(tokens: Sequence[int], block_tokens: int) -> list[Key]:
    """The key of each full block of a prompt."""
    keys, key = [], b""
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        content = array("q", tokens[start : start + block_tokens]).tobytes()
        key = hashlib.blake2b(key + content, digest_size=16).digest()
        keys.append(key)
    return keys


class BlockPool:
    """Blocks 0 to total - 1, each free (nobody's) or with a count of owners."""

    def __init__(self, total: int) -> None:
        self.total, self._owned = total, 0
        self.clear()

    def clear(self) -> None:
        """Forget all contents. Only while nobody owns a block."""
        if self._owned:
            raise RuntimeError(f"{self._owned} blocks have owners: contents can't be forgotten")
        self._owners = [0] * self.total
        self._key_of: list[Key | None] = [None] * self.total
        self._block_of: dict[Key, int] = {}
        self._was_shared = [False] * self.total
        self._idle = list(range(self.total))  # a heap; a block that was taken by its key is skipped when met
        self._in_heap = [True] * self.total
        self._passed: OrderedDict[int, None] = OrderedDict()  # nobody's, of running sequences; oldest first
        self._proven: OrderedDict[int, None] = OrderedDict()  # nobody's, but shared before; oldest first

    @property
    def free(self) -> int:
        """How many `take` could give."""
        return self.total - self._owned

    def owners(self, block: int) -> int:
        """How many hold it."""
        return self._owners[block]

    def take(self) -> int | None:
        """A block for new contents, with one owner; None where all are owned."""
        block = self._next()
        if block is None:
            return None
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None
        self._was_shared[block] = False
        self._owners[block] = 1
        self._owned += 1
        return block

    def _next(self) -> int | None:
        while self._idle:
            block = heapq.heappop(self._idle)
            self._in_heap[block] = False
            if self._owners[block] == 0 and block not in self._proven and block not in self._passed:
                return block
        queue = self._passed or self._proven
        return queue.popitem(last=False)[0] if queue else None

    def publish(self, block: int, key: Key) -> None:
        """Make an owned block findable. Where another one has the same contents, that one stays the known one."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def known(self, keys: Sequence[Key], live: int | None = None) -> tuple[int, list[int]]:
        """(count, blocks): the longest prefix of `keys` whose last `live` blocks are there (None: all), and these."""
        blocks = [self._block_of.get(key) for key in keys]
        run, best = 0, 0  # of blocks that are there, up to and with this one
        for count, block in enumerate(blocks, 1):
            run = 0 if block is None else run + 1
            if run >= (count if live is None else min(live, count)):
                best = count
        first = 0 if live is None else max(0, best - live)
        return best, [block for block in blocks[first:best] if block is not None]

    def share(self, block: int) -> int:
        """Take part in a block that `known` found; returns it."""
        self._proven.pop(block, None)
        self._passed.pop(block, None)
        self._owned += self._owners[block] == 0
        self._owners[block] += 1
        self._was_shared[block] = True
        return block

    def release(self, block: int, is_passed: bool = False) -> None:
        """One owner less. A block without owners keeps its contents until `take` gives it away.

        Args:
            is_passed: its owner goes on without it.
        """
        if self._owners[block] == 0:
            raise RuntimeError(f"block {block} has no owner to release it")
        self._owners[block] -= 1
        if self._owners[block]:
            return
        self._owned -= 1
        if self._was_shared[block]:
            self._proven[block] = None
        elif is_passed and self._key_of[block] is not None:
            self._passed[block] = None
        elif not self._in_heap[block]:
            heapq.heappush(self._idle, block)
            self._in_heap[block] = True
