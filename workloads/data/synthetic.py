"""A text of an invented language, made by integers alone: the same bytes on every machine and Python.

Each document starts from nothing and depends on its own number alone. A letter is drawn from the letters' frequencies,
which follow Zipf's law; or it follows the letter before; or the two letters before, whose pairs have four followers
each, the first twice as likely as the second. So a model can learn, pair after pair, 4,096 habits whose frequencies
fall as powers: the picture of Michaud et al. 2023 ("The Quantization Model of Neural Scaling"), in which the loss
falls as a power of what a model can hold and of what it has seen, down to the entropy of the language.
Random numbers: SplitMix64 (Steele et al. 2014) of a counter, in unsigned 64-bit integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

LETTERS = " etaoinshrdlucmfwypvbgkjqxz.ETAOINSHRDLUCMFWYPVBGKJQXZ0123456789"  # the most frequent first
FOLLOWERS = 4  # of a letter, and of a pair of letters; the k-th has a share of 1 / k
ALONE, AFTER_ONE = (
    6554,
    19661,
)  # of 65,536: drawn from the frequencies alone (10 %), after one letter (30 %); else two
DOCUMENT_LETTERS = 2048
AT_ONCE = 512  # documents that are made together

Integers = npt.NDArray[np.int64]
_STREAM = {"followers of a letter": 8, "followers of a pair": 1, "text": 2}  # no two share a counter


def documents(count: int) -> Iterator[str]:
    """The first `count` documents; the first ones are the same whatever the count."""
    for first in range(0, count, AT_ONCE):
        numbers = np.arange(first, min(first + AT_ONCE, count), dtype=np.uint64)
        for row in _letters(numbers):
            yield row.tobytes().decode("ascii")


def entropy_nats(sample: int = 256) -> float:
    """The mean of -ln p(next letter | all before) over `sample` documents, below which no loss lies."""
    place = {letter: index for index, letter in enumerate(LETTERS)}
    text = np.array([[place[letter] for letter in document] for document in documents(sample)])
    one, pair, drawn = text[:, 1:-1], text[:, :-2] * len(LETTERS) + text[:, 1:-1], text[:, 2:]
    single = np.diff(_cumulative(len(LETTERS)), prepend=0) / _cumulative(len(LETTERS))[-1]
    share = np.diff(_cumulative(FOLLOWERS), prepend=0) / _cumulative(FOLLOWERS)[-1]
    after_one = ((_followers("followers of a letter", 1)[one] == drawn[..., None]) * share).sum(axis=-1)
    after_two = ((_followers("followers of a pair", 2)[pair] == drawn[..., None]) * share).sum(axis=-1)
    alone, either = ALONE / 65536, (ALONE + AFTER_ONE) / 65536
    p = alone * single[drawn] + (either - alone) * after_one + (1 - either) * after_two
    return float(-np.log(p).mean())


def _letters(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """The documents of those numbers, (documents, DOCUMENT_LETTERS), as ASCII."""
    single, rank = _cumulative(len(LETTERS)), _cumulative(FOLLOWERS)
    after_one, after_two = _followers("followers of a letter", 1), _followers("followers of a pair", 2)
    before = last = np.zeros(len(numbers), dtype=np.int64)
    text = np.empty((len(numbers), DOCUMENT_LETTERS), dtype=np.uint8)
    alphabet = np.frombuffer(LETTERS.encode("ascii"), dtype=np.uint8)
    for at in range(DOCUMENT_LETTERS):
        drawn = _random("text", (numbers << np.uint64(12)) + np.uint64(at))
        how = _bits(drawn, 0, 16)
        follower = _pick(rank, _bits(drawn, 16, 24))
        habit = np.where(
            how < ALONE + AFTER_ONE,
            after_one[last, follower],
            after_two[before * len(LETTERS) + last, follower],
        )
        letter = np.where(how < ALONE, _pick(single, _bits(drawn, 40, 24)), habit)
        text[:, at] = alphabet[letter]
        before, last = last, letter
    return text


@cache
def _followers(stream: str, letters: int) -> Integers:
    """The followers of each context of so many letters, (64^letters, FOLLOWERS): drawn by their frequency."""
    contexts = len(LETTERS) ** letters
    drawn = _random(stream, np.arange(contexts * FOLLOWERS, dtype=np.uint64))
    return _pick(_cumulative(len(LETTERS)), _bits(drawn, 40, 24)).reshape(contexts, FOLLOWERS)


@cache
def _cumulative(ranks: int) -> Integers:
    """Running sums of Zipf's weights, 1 / rank, in millionths."""
    return np.cumsum(1_000_000 // np.arange(1, ranks + 1, dtype=np.int64))


def _pick(cumulative: Integers, bits_24: Integers) -> Integers:
    """The rank that 24 random bits fall on."""
    found: Integers = np.searchsorted(cumulative, bits_24 * cumulative[-1] >> 24, side="right").astype(
        np.int64
    )
    return found


def _bits(drawn: npt.NDArray[np.uint64], first: int, count: int) -> Integers:
    return ((drawn >> np.uint64(first)) & np.uint64((1 << count) - 1)).astype(np.int64)


def _random(stream: str, counter: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 random bits for each counter (below 2^56): SplitMix64's output for the state `counter`."""
    x = counter + np.uint64(_STREAM[stream] << 56) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
