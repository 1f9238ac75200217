"""Documents of random pairs (key, value), and what an ideal reader's loss on them is, exactly (docs/theory A.11).

A document is key, value, key, value, ...: keys drawn independently with p_r proportional to r^-s, the value looked up
in a random map of the document's own. The reader knows p and learns the map from the pairs that it has seen.

Letters: K keys, V values, N windows, T tokens of context, n = T/2 pairs in a window, D documents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt

from escala.schema import RecallCorpus
from workloads.data.mixture import Integers, generator

Floats = npt.NDArray[np.float64]
BLOCK_DOCUMENTS = 64  # drawn from one generator
TRAIN, HELD_OUT = 0, 1  # words of the generators' seeds
KEY, UNSEEN, FIRST_BUCKET = 0, 1, 2
"""Groups of targets: a key; the value of a key that the window has not shown; and the value of a key that it has, by
powers of two of the distance."""


def documents(corpus: RecallCorpus, split: int) -> Iterator[npt.NDArray[np.uint32]]:
    """The token ids of each document of a split, TRAIN or HELD_OUT. A larger split begins with the same documents."""
    count = corpus.documents if split == TRAIN else corpus.held_out_documents
    blocks = map(partial(_block, corpus, split), range(-(-count // BLOCK_DOCUMENTS)))
    return islice((document for block in blocks for document in block), count)


def _block(corpus: RecallCorpus, split: int, block: int) -> npt.NDArray[np.uint32]:
    """BLOCK_DOCUMENTS documents: (D, document_tokens)."""
    draw = generator(corpus.seed, split, block)
    shape = (BLOCK_DOCUMENTS, corpus.document_tokens // 2)
    bounds_K = np.cumsum(key_probabilities(corpus))[:-1]
    keys_Dn = np.searchsorted(bounds_K, draw.random_sample(shape), side="right")
    map_DK = draw.randint(corpus.values, size=(BLOCK_DOCUMENTS, corpus.keys))
    values_Dn = corpus.keys + np.take_along_axis(map_DK, keys_Dn, axis=1)
    return np.stack([keys_Dn, values_Dn], axis=-1).reshape(BLOCK_DOCUMENTS, -1).astype(np.uint32)


def digest(document: npt.NDArray[np.uint32]) -> bytes:
    """SHA-256 of a document's token ids."""
    return hashlib.sha256(document.astype("<u4").tobytes()).digest()


def key_probabilities(corpus: RecallCorpus) -> Floats:
    """p_K, largest first."""
    weights_K = np.arange(1, corpus.keys + 1, dtype=np.float64) ** -corpus.exponent
    return np.asarray(weights_K / weights_K.sum())


def key_entropy(corpus: RecallCorpus) -> float:
    """H(p), nats: what a key costs."""
    p_K = key_probabilities(corpus)
    return float(-(p_K * np.log(p_K)).sum())


def unseen_share(corpus: RecallCorpus, context_tokens: int, window_tokens: int | None = None) -> float:
    """Share of a window's values whose key has not been shown before.

    It is the mean over j < n of u(min(j, m)), u(j) = sum_r p_r (1 - p_r)^j: a reader of the last W tokens alone sees
    m = floor((W - 1) / 2) whole pairs at most (`window_tokens`; None: all).
    """
    n = context_tokens // 2
    seen = n - 1 if window_tokens is None else min(n - 1, (window_tokens - 1) // 2)
    p_K = key_probabilities(corpus)
    first = 1 - (1 - p_K) ** (seen + 1)  # the pairs up to it, summed
    return float((first + (n - 1 - seen) * p_K * (1 - p_K) ** seen).sum() / n)


def ideal_loss(corpus: RecallCorpus, context_tokens: int, window_tokens: int | None = None) -> float:
    """L(T), nats per token: H(p)/2 + (ln V)/2 times `unseen_share`.

    A window of T + 1 tokens begins on a key, so its T targets are n values (of a key that stands before them, with
    0 .. n - 1 whole pairs visible) and n keys.
    """
    unseen = unseen_share(corpus, context_tokens, window_tokens)
    return 0.5 * (key_entropy(corpus) + math.log(corpus.values) * unseen)


@dataclass(frozen=True)
class TargetGroup:
    """A group of targets. `distance_tokens`: from the key to its last occurrence, (above, up to); None: it has none.
    `share`: of all targets, exactly. `ideal_loss_nats`: a target of it costs an ideal reader so much.
    """

    name: str
    distance_tokens: tuple[int, int] | None
    share: float
    ideal_loss_nats: float


def target_groups(corpus: RecallCorpus, context_tokens: int) -> list[TargetGroup]:
    """The groups of a window of T tokens in the order of their numbers (`group_targets`); the shares add up to 1."""
    n = context_tokens // 2
    p_K = key_probabilities(corpus)
    weight_K = p_K**2
    shares = np.zeros(bucket(max(1, n - 1)) + 1)
    for pairs in range(1, n):
        shares[bucket(pairs)] += (n - pairs) / n * weight_K.sum()
        weight_K *= 1 - p_K
    ends = [2 << number for number in range(len(shares))]
    return [
        TargetGroup("key", None, 0.5, key_entropy(corpus)),
        TargetGroup("value_unseen", None, unseen_share(corpus, context_tokens) / 2, math.log(corpus.values)),
        *(
            TargetGroup(f"value_{end}", (end // 2 if end > 2 else 0, end), float(share) / 2, 0.0)
            for end, share in zip(ends, shares, strict=True)
        ),
    ]


def bucket(pairs: int) -> int:
    """Of a distance in pairs: 0 for 1, 1 for 2, 2 for 3 and 4, 3 for 5 to 8, ..."""
    return (pairs - 1).bit_length()


def group_targets(corpus: RecallCorpus, tokens_NT1: Integers) -> Integers:
    """The group of each target, shape (N, T): KEY, UNSEEN, or FIRST_BUCKET + `bucket` of the distance in pairs to the
    key's last occurrence in the window.
    """
    keys_Nn = tokens_NT1[:, 0:-1:2]
    windows, pairs = keys_Nn.shape
    order_Nn = np.argsort(keys_Nn, axis=1, kind="stable")
    sorted_Nn = np.take_along_axis(keys_Nn, order_Nn, axis=1)
    again_Nm = sorted_Nn[:, 1:] == sorted_Nn[:, :-1]
    distance_Nm = np.where(again_Nm, np.diff(order_Nn, axis=1), 0)
    numbers = np.array([UNSEEN, *(FIRST_BUCKET + bucket(each) for each in range(1, max(2, pairs)))])
    values_Nn = np.full((windows, pairs), UNSEEN, dtype=np.int64)
    np.put_along_axis(values_Nn, order_Nn[:, 1:], numbers[distance_Nm], axis=1)
    groups_NT = np.full((windows, 2 * pairs), KEY, dtype=np.int64)
    groups_NT[:, 0::2] = values_Nn
    return groups_NT
