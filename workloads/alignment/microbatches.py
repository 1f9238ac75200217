"""An iteration's rows, and how minibatches, ranks and micro-batches cut them: pure, and without padding waste.

Any rank may learn from any row (rows are exchanged once), so that ranks get equal work and the same minibatches at any
number of them.

Dimensions: B rows, T response tokens, S tokens of a micro-batch's rows, N response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ORDER = 11  # of the random numbers: minibatches draw from (seed, ORDER, iteration, epoch)


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts with their responses, and numbers for every response token.

    Attributes:
        sequences: prompt and response of each row, as one.
        prompt_lengths: tokens of each prompt, from 1 up.
        columns: (B, T) by name, 0 past a response's end; T is the longest response's.
    """

    sequences: list[list[int]]
    prompt_lengths: list[int]
    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.sequences]

    @property
    def response_lengths_B(self) -> Tensor:
        """Tokens of each response."""
        pairs = zip(self.sequences, self.prompt_lengths, strict=True)
        return torch.tensor([len(row) - prompt for row, prompt in pairs])

    @property
    def mask_BT(self) -> Tensor:
        """Which places of the columns hold a response token."""
        lengths_B = self.response_lengths_B
        return torch.arange(int(lengths_B.max())) < lengths_B[:, None]

    @classmethod
    def join(cls, parts: Sequence[RolloutBatch], order: Sequence[int]) -> RolloutBatch:
        """The rows of several parts, number `order[i]` of them all (in the parts' order) at place i."""
        width = max(int(part.response_lengths_B.max()) for part in parts)
        columns = {
            name: torch.cat([_widened(part.columns[name], width) for part in parts])
            for name in parts[0].columns
        }
        sequences = [row for part in parts for row in part.sequences]
        prompts = [length for part in parts for length in part.prompt_lengths]
        return cls(
            [sequences[i] for i in order],
            [prompts[i] for i in order],
            {name: column[list(order)] for name, column in columns.items()},
        )


def _widened(column_BT: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(column_BT, (0, width - column_BT.shape[1]))


@dataclass(frozen=True)
class MicroBatch:
    """Some rows in one forward pass.

    Attributes:
        rows: their numbers; empty for a pass that only keeps a rank in step with the others.
        tokens_BS: padded on the right.
        at_BS: where the next token is a response's, N in all.
        last_BS: each row's last token.
        targets_N: those next tokens, in row order.
        mask_BT: as in `RolloutBatch`, of these rows, as wide as the longest response among them.
    """

    rows: list[int]
    tokens_BS: Tensor
    at_BS: Tensor
    last_BS: Tensor
    targets_N: Tensor
    mask_BT: Tensor

    @property
    def before_last(self) -> tuple[Tensor, Tensor]:
        """tokens and `at` without the last column, whose tokens predict nothing of a response."""
        return self.tokens_BS[:, :-1], self.at_BS[:, :-1]

    def place(self, values_N: Tensor) -> Tensor:
        """Values of the response tokens as (B, T), 0 elsewhere; differentiable."""
        empty_BT = torch.zeros(self.mask_BT.shape, dtype=values_N.dtype, device=values_N.device)
        return empty_BT.masked_scatter(self.mask_BT, values_N)

    def take(self, column_BT: Tensor) -> Tensor:
        """The part of a column of `RolloutBatch` that belongs to these rows, on their device."""
        if not self.rows:
            return torch.zeros(self.mask_BT.shape, dtype=column_BT.dtype, device=self.mask_BT.device)
        return column_BT[self.rows, : self.mask_BT.shape[1]].to(self.mask_BT.device)


def micro_batch(rows: RolloutBatch, chosen: Sequence[int], device: torch.device) -> MicroBatch:
    """The rows `chosen`. Without any, the shortest row with nothing of it counted."""
    real = list(chosen) or [min(range(len(rows)), key=lambda i: len(rows.sequences[i]))]
    sequences = [rows.sequences[i] for i in real]
    width = max(map(len, sequences))
    tokens_BS = torch.tensor([row + [0] * (width - len(row)) for row in sequences])
    lengths_B = torch.tensor([len(row) for row in sequences])
    prompts_B = torch.tensor([rows.prompt_lengths[i] for i in real])
    place = torch.arange(width)
    last_BS = place == lengths_B[:, None] - 1
    at_BS = (place >= prompts_B[:, None] - 1) & (place < lengths_B[:, None] - 1)
    responses_B = lengths_B - prompts_B
    mask_BT = torch.arange(int(responses_B.max())) < responses_B[:, None]
    if not chosen:
        at_BS, last_BS, mask_BT = (torch.zeros_like(x) for x in (at_BS, last_BS, mask_BT))
    targets_N = tokens_BS.roll(-1, dims=1)[at_BS]
    tensors = (tokens_BS, at_BS, last_BS, targets_N, mask_BT)
    return MicroBatch(list(chosen), *(tensor.to(device) for tensor in tensors))


def minibatches(rows: int, count: int, seed: int, iteration: int, epoch: int) -> list[list[int]]:
    """`count` parts of the rows in an order of the epoch's own, of sizes that differ by one at most."""
    order = np.random.default_rng([seed, ORDER, iteration, epoch]).permutation(rows)
    return [part.tolist() for part in np.array_split(order, count)]


def cut(lengths: Sequence[int], chosen: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """`chosen` rows as micro-batches of similar lengths, each within the budget: rows times the longest. A row that
    is longer than the budget is a micro-batch of its own.
    """
    parts: list[list[int]] = []
    for row in sorted(chosen, key=lambda i: (lengths[i], i)):
        if parts and (len(parts[-1]) + 1) * lengths[row] <= budget_tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def deal(
    lengths: Sequence[int], chosen: Sequence[int], ranks: int, budget_tokens: int
) -> list[list[list[int]]]:
    """The micro-batches of every rank: equally many for all (ZeRO-3 gathers parameters in each pass; what is missing is
    empty), of about equal work.
    """
    longest_first = sorted(chosen, key=lambda i: (-lengths[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for place, row in enumerate(longest_first):
        turn, rank = divmod(place, ranks)
        shares[ranks - 1 - rank if turn % 2 else rank].append(row)  # there and back: equal sums
    parts = [cut(lengths, share, budget_tokens) for share in shares]
    most = max(map(len, parts))
    return [mine + [[]] * (most - len(mine)) for mine in parts]
