"""Held-out loss: the same tokens at every number of ranks, each rank a share, the sums added."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from workloads.training.loss import token_loss


@dataclass(frozen=True)
class HeldOut:
    """Mean loss on held-out text."""

    loss_nats: float  # per token
    bits_per_byte: float
    tokens: int


def bits_per_byte(loss_nats: float, bytes_per_token: float) -> float:
    """Nats per token as bits per byte of text: comparable between tokenizers."""
    return loss_nats / (math.log(2) * bytes_per_token)


@torch.no_grad()
def evaluate(engine: Any, tokens_NT1: Tensor, bytes_per_token: float, batch_sequences: int) -> HeldOut:
    """Mean loss over all N * T targets of `tokens_NT1` (N sequences of T + 1 token ids, the same on every
    rank).

    A collective call. Under ZeRO-3 every forward pass gathers parameters, so all ranks make equally many: a
    rank without sequences left runs one that does not count.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = tokens_NT1[rank::ranks]
    passes = math.ceil(math.ceil(len(tokens_NT1) / ranks) / batch_sequences)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.eval()
    for index in range(passes):
        part = mine[index * batch_sequences : (index + 1) * batch_sequences]
        counts = len(part) > 0
        tokens_BT1 = (part if counts else tokens_NT1[:1]).to(engine.device)
        total, number = token_loss(engine(tokens_BT1[:, :-1]), tokens_BT1[:, 1:])
        if counts:
            sums += torch.stack([total.double(), number.double()])
    engine.train()
    torch.distributed.all_reduce(sums)
    loss = float(sums[0] / sums[1])
    return HeldOut(loss, bits_per_byte(loss, bytes_per_token), int(sums[1]))
