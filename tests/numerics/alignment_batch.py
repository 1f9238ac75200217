"""The small batch that the alignment tests share: plain lists for the references, tensors for us."""

from __future__ import annotations

import random

import torch
from torch import Tensor

Rows = list[list[float]]
# Ragged, holes, a one-token answer at either end, and a row without any.
MASK = [
    [1, 1, 1, 1, 1, 1, 1],
    [0, 1, 1, 0, 0, 1, 0],
    [1, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 1],
    [0, 0, 0, 0, 0, 0, 0],
    [0, 0, 1, 1, 1, 0, 0],
]
B, T = len(MASK), len(MASK[0])
mask_BT = torch.tensor(MASK, dtype=torch.bool)


def normal(seed: int, scale: float = 1.0) -> Rows:
    draw = random.Random(seed)
    return [[draw.gauss(0.0, scale) for _ in range(T)] for _ in range(B)]


def tensor(rows: Rows | list[float], gradient: bool = False) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=gradient)


def poison(x: Tensor, value: float) -> Tensor:
    return torch.where(mask_BT, x, value).detach().requires_grad_(x.requires_grad)


def valid(row: int) -> list[int]:
    return [t for t in range(T) if MASK[row][t]]


def assert_close(ours: Tensor, reference: Rows | list[float] | float, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours.double(), tensor(reference), rtol=tolerance, atol=tolerance)
