"""What all ranks decide as one. Every function is a collective call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed

from escala.contract.errors import EscalaError

T = TypeVar("T")


class AgreedError(Exception):
    """`error` happened on a rank, every rank knows it and raises this, and the weights are as they were."""

    def __init__(self, error: EscalaError) -> None:
        super().__init__(str(error))
        self.error = error


def on_all_ranks(work: Callable[[], T]) -> T:
    """The result of `work`, done on every rank. Raises AgreedError, on all, with the first rank's EscalaError."""
    results: list[T] = []
    failure: EscalaError | None = None
    try:
        results.append(work())
    except EscalaError as error:
        failure = error
    failures: list[EscalaError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    for found in failures:
        if found is not None:
            raise AgreedError(found)
    return results[0]


def from_first_rank(value: int, device: torch.device) -> int:
    """Rank 0's value."""
    if torch.distributed.get_world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    torch.distributed.broadcast(shared, src=0)
    return int(shared)
