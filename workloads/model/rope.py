"""Rotary positions (Su et al. 2021; docs/theory A.2) in Hugging Face's layout: channel i turns with i + d_h/2.

Dimensions: B batch, T context, H heads, S head size, h = S/2.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of position x frequency, made in fp32 on first use, extended for longer contexts.

    Not a buffer: `model.to(bfloat16)` would round it, and `to_empty` after meta would leave it rubbish.
    """

    def __init__(self, head_size: int, base: float) -> None:
        self.head_size = head_size
        self.base = base
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, positions: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) in the dtype and on the device of `like`.

        Args:
            positions: their number T, for 0..T-1: tables of shape (T, 1, h); or positions_BT: (B, T, 1, h).
        """
        longest = positions if isinstance(positions, int) else int(positions.max()) + 1
        key = (like.device, like.dtype)
        if key not in self._tables or len(self._tables[key][0]) < longest:
            self._tables[key] = self._make(max(longest, 256), like)
        index = slice(positions) if isinstance(positions, int) else positions
        cos, sin = self._tables[key]
        return cos[index], sin[index]

    def _make(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of `length` positions, shape (length, 1, h)."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # an inference tensor could not be saved for backward
            channels = torch.arange(0, self.head_size, 2, device=like.device, dtype=torch.float32)
            frequencies = self.base ** -(channels / self.head_size)
            steps = torch.arange(length, device=like.device, dtype=torch.float32)
            angles = torch.outer(steps, frequencies).unsqueeze(1)
            return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x_BTHS: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x_BTHS turned by the angles of `RotaryTable`."""
    first, second = x_BTHS.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
