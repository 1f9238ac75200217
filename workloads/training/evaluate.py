"""Held-out sums: the same examples at every number of ranks, each rank a share, the sums added."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor


def bits_per_byte(loss_nats: float, bytes_per_token: float) -> float:
    """Nats per token as bits per byte of text: comparable between tokenizers."""
    return loss_nats / (math.log(2) * bytes_per_token)


@torch.no_grad()
def held_out_sums(
    engine: Any, examples: int, batch_examples: int, sums: Callable[[list[int]], Tensor]
) -> list[float]:
    """`sums` of batches of examples, added over all examples and ranks.

    A collective call. Under ZeRO-3 every forward pass gathers parameters, so all ranks make equally many: a
    rank without examples left runs one that does not count.

    Args:
        examples: how many there are, the same on every rank.
        sums: given indices of examples, a vector of sums over them, on the engine's device.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = list(range(rank, examples, ranks))
    passes = math.ceil(math.ceil(examples / ranks) / batch_examples)
    engine.eval()
    total = None
    for index in range(passes):
        part = mine[index * batch_examples : (index + 1) * batch_examples]
        found = sums(part or [0]).double()
        total = torch.zeros_like(found) if total is None else total
        total += found if part else 0.0
    engine.train()
    if total is None:
        raise ValueError("there are no held-out examples")
    torch.distributed.all_reduce(total)
    sums_of_all: list[float] = total.tolist()  # one wait for a GPU, not one a number
    return sums_of_all


def held_out_rows(
    engine: Any, examples: int, batch_examples: int, rows: Callable[[list[int]], Tensor]
) -> Tensor:
    """`rows` of all examples, float64 on the CPU, shape (examples, K); a collective call, as `held_out_sums`.

    Args:
        rows: given indices of B examples, (B, K).
    """

    def placed(indices: list[int]) -> Tensor:
        found = rows(indices).double()
        out = torch.zeros(examples, found.shape[1], dtype=torch.float64, device=found.device)
        out[indices] = found
        return out.flatten()

    flat = held_out_sums(engine, examples, batch_examples, placed)
    return torch.tensor(flat, dtype=torch.float64).reshape(examples, -1)
