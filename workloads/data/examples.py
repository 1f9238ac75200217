"""Tokenised examples of fine-tuning: each a sequence of tokens, of which some are answers; stored once, by content.

Dimensions: B rows, T positions. A sequence of L tokens gives L - 1 positions: inputs and their next tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

from workloads.data.batches import Batch
from workloads.data.mixture import epoch_order

PADDING = -1  # the document number of what pads a row
ROUND = 8  # rows are as long as the longest of their micro-batch, up to a multiple of this


@dataclass(frozen=True)
class Sequences:
    """Many sequences in flat arrays: that of number i is [starts[i], starts[i + 1])."""

    tokens: npt.NDArray[np.int32]
    answers: npt.NDArray[np.bool_]  # which tokens the model is to learn
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Sequences:
        """From (token ids, which of them are answers) of each."""
        lengths = [len(ids) for ids, _ in sequences]
        return cls(
            np.fromiter((t for ids, _ in sequences for t in ids), dtype=np.int32, count=sum(lengths)),
            np.fromiter((a for _, answers in sequences for a in answers), dtype=np.bool_, count=sum(lengths)),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each."""
        return np.diff(self.starts)

    def answer_counts(self) -> npt.NDArray[np.int64]:
        """Targets of each: its answers' tokens, the first token of a sequence being nobody's target."""
        counts = [self.answers[s + 1 : e].sum() for s, e in zip(self.starts, self.starts[1:], strict=False)]
        return np.asarray(counts, dtype=np.int64)

    def slice(self, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Tokens and answers of one."""
        part = slice(self.starts[number], self.starts[number + 1])
        return self.tokens[part], self.answers[part]

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({"tokens": self.tokens, "answers": self.answers, "starts": self.starts}, path)

    @classmethod
    def load(cls, path: Path) -> Sequences:
        """Read it."""
        return cls(**load_file(path))


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Sequences into rows of at most `room` positions: best fit of the longest first (Johnson et al. 1974). Each
    sequence takes one position less than it has tokens. Deterministic.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows by what is left in them
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        need = lengths[number] - 1
        left = next((r for r in range(need, room) if by_room[r]), room)
        row = by_room[left].pop() if left < room else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        by_room[left - need].append(row)
    return rows


def row_batch(sequences: Sequences, rows: Sequence[Sequence[int]]) -> Batch:
    """Rows of sequences as tensors_BT: tokens, targets, answers (which targets count), positions and, where a row holds
    several, documents. No document sees another.
    """
    longest = max(sum(len(sequences.slice(n)[0]) - 1 for n in row) for row in rows)
    shape = (len(rows), -(-longest // ROUND) * ROUND)
    tokens, targets, positions = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    answers, documents = np.zeros(shape, dtype=np.bool_), np.full(shape, PADDING, dtype=np.int64)
    for b, row in enumerate(rows):
        at = 0
        for document, number in enumerate(row):
            ids, is_answer = sequences.slice(number)
            part = slice(at, at + len(ids) - 1)
            tokens[b, part], targets[b, part], answers[b, part] = ids[:-1], ids[1:], is_answer[1:]
            positions[b, part], documents[b, part] = np.arange(len(ids) - 1), document
            at += len(ids) - 1
    found = {"tokens_BT": tokens, "targets_BT": targets, "answers_BT": answers}
    if any(len(row) > 1 for row in rows):
        found |= {"positions_BT": positions, "documents_BT": documents}
    return {name: torch.from_numpy(array) for name, array in found.items()}


class Draws:
    """Which item each draw of a run is: every epoch visits all of them, in an order drawn from (seed, epoch).

    Args:
        items: how many there are.
        batch: draws of an optimiser step, over all ranks and micro-batches.
    """

    def __init__(self, items: int, batch: int, seed: int) -> None:
        self.items, self.batch_size, self.seed = items, batch, seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def step(self, step: int) -> list[int]:
        """The items of a whole step."""
        return self._at(step * self.batch_size, self.batch_size)

    def micro_batch(self, step: int, micro: int, rank: int, ranks: int, size: int) -> list[int]:
        """Those of a rank's micro-batch of `size`, cut as data.batches cuts a step."""
        return self._at(step * self.batch_size + (micro * ranks + rank) * size, size)

    def _at(self, first: int, count: int) -> list[int]:
        return [self._item(number) for number in range(first, first + count)]

    def _item(self, number: int) -> int:
        epoch, place = divmod(number, self.items)
        if epoch not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = epoch_order(self.items, self.seed, 0, epoch)
        return int(self._orders[epoch][place])
