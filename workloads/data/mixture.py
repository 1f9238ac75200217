"""Which corpus, and which window of it, each training sequence is: pure functions of (weights, seed, number).

Sequences are numbered 0, 1, ... over the whole run, whatever the batch and the number of ranks. Every block
of BLOCK_SEQUENCES holds exact shares of the corpora in an order drawn from (seed, block).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

BLOCK_SEQUENCES = 1000
Integers = npt.NDArray[np.int64]


def block_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Sequences of each corpus in a block: by weight, at least one each, BLOCK_SEQUENCES in all."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK_SEQUENCES
    shares = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := BLOCK_SEQUENCES - int(shares.sum())) > 0:
        shares[np.argmax(exact - shares)] += 1
    for _ in range(-missing):
        shares[np.argmax(np.where(shares > 1, shares - exact, -np.inf))] -= 1
    return tuple(shares.tolist())


def generator(*words: int) -> np.random.RandomState:
    """A generator whose numbers depend on `words` alone. RandomState's stream never changes (NEP 19)."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(words)))


def draw(shares: tuple[int, ...], seed: int, sequence: int) -> tuple[int, int]:
    """(corpus, how many sequences of that corpus came before) of a sequence."""
    if len(shares) == 1:
        return 0, sequence
    block, place = divmod(sequence, BLOCK_SEQUENCES)
    order, before = _block(shares, seed, block)
    corpus = int(order[place])
    return corpus, block * shares[corpus] + int(before[place])


@lru_cache(maxsize=4)
def _block(shares: tuple[int, ...], seed: int, block: int) -> tuple[Integers, Integers]:
    """The corpus of each place in a block, and how many places before it have the same."""
    order = generator(seed, 0, block).permutation(np.repeat(np.arange(len(shares)), shares))
    before = np.zeros_like(order)
    for corpus, share in enumerate(shares):
        before[order == corpus] = np.arange(share)
    return order, before


def epoch_order(windows: int, seed: int, corpus: int, epoch: int) -> Integers:
    """The order in which an epoch visits the windows of a corpus: a permutation of range(windows)."""
    return generator(seed, 1, corpus, epoch).permutation(windows).astype(np.int64)
