"""Training batches as a pure function of (seed, step): the same at any number of ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workloads.data.mixture import BLOCK_SEQUENCES, Integers, block_shares, draw, epoch_order
from workloads.data.prepared import PreparedData, window_at

Batch = dict[str, Tensor]
"""What a task's loss is given: tensors by name."""


class Batches:
    """The training sequences of a run.

    Args:
        prepared: the data; `check` it against the config before.
        context_tokens: T; a sequence has T + 1 tokens, inputs and targets.
        batch_sequences: sequences of one optimiser step, over all ranks.
        seed: of the order.
        micro_batch_sequences: sequences of one micro-batch of one rank; None: all of its share.
    """

    def __init__(
        self,
        prepared: PreparedData,
        context_tokens: int,
        batch_sequences: int,
        seed: int,
        micro_batch_sequences: int | None = None,
    ) -> None:
        self.context_tokens = context_tokens
        self.batch_sequences = batch_sequences
        self.seed = seed
        self.micro_batch_sequences = micro_batch_sequences
        self._tokens = [corpus.tokens("train") for corpus in prepared.corpora]
        self.windows = prepared.windows(context_tokens)
        self._shares = block_shares(prepared.weights)
        self._orders: dict[tuple[int, int], Integers] = {}

    def batch(self, step: int, rank: int = 0, ranks: int = 1, micro: int = 0) -> Tensor:
        """tokens_BT1 (int64) of a micro-batch of a rank. All of them together are the step's global batch.

        Raises ValueError where (rank, ranks, micro) do not cut the batch.
        """
        size = self.micro_batch_sequences or self.batch_sequences // ranks
        first = (micro * ranks + rank) * size
        if (
            self.batch_sequences % (ranks * size)
            or not 0 <= rank < ranks
            or first + size > self.batch_sequences
        ):
            raise ValueError(
                f"rank {rank} of {ranks}, micro-batch {micro} of {size} sequences: "
                f"no part of a batch of {self.batch_sequences}"
            )
        start = step * self.batch_sequences + first
        return torch.from_numpy(np.stack([self._sequence(index) for index in range(start, start + size)]))

    def locate(self, sequence: int) -> tuple[int, int, int]:
        """(corpus, epoch of that corpus, window) of the run's sequence of that number."""
        corpus, before = draw(self._shares, self.seed, sequence)
        epoch, place = divmod(before, self.windows[corpus])
        if (corpus, epoch) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != corpus or k[1] == epoch - 1}
            self._orders[corpus, epoch] = epoch_order(self.windows[corpus], self.seed, corpus, epoch)
        return corpus, epoch, int(self._orders[corpus, epoch][place])

    def epochs(self, steps: int) -> list[float]:
        """How often `steps` optimiser steps go through each corpus."""
        sequences = steps * self.batch_sequences
        shares = [share / BLOCK_SEQUENCES for share in self._shares]
        return [float(sequences * s / w) for s, w in zip(shares, self.windows, strict=True)]

    def _sequence(self, sequence: int) -> Integers:
        corpus, _, window = self.locate(sequence)
        return window_at(self._tokens[corpus], window, self.context_tokens)
