"""A matrix as a product of two thin ones: the truncated SVD (docs/theory E.3).

Dimensions: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from escala.contract.errors import SpecError


@dataclass(frozen=True)
class LowRankWeight:
    """weight = left_OR right_RI, the factors in bf16."""

    left_OR: Tensor
    right_RI: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return len(self.left_OR), self.right_RI.shape[1]

    @property
    def nbytes(self) -> int:
        """As stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by the names that a state dictionary has."""
        return {"left": self.left_OR, "right": self.right_RI}

    def with_tensors(self, tensors: dict[str, Tensor]) -> LowRankWeight:
        """The same with other `tensors` of the same shapes."""
        return LowRankWeight(tensors["left"], tensors["right"])

    def dequantize(self) -> Tensor:
        """weight_OI in fp32."""
        return self.left_OR.float() @ self.right_RI.float()


def truncate(weight_OI: Tensor, rank: int) -> LowRankWeight:
    """The best approximation of `rank` (Eckart & Young 1936), its singular values shared between the factors.

    Raises SpecError where the matrix has no such rank.
    """
    if not 1 <= rank <= min(weight_OI.shape):
        raise SpecError(
            f"A matrix of {tuple(weight_OI.shape)} has no rank {rank}.", f"Give 1 to {min(weight_OI.shape)}."
        )
    left, values, right = torch.linalg.svd(weight_OI.detach().float(), full_matrices=False)
    root_R = values[:rank].sqrt()
    return LowRankWeight((left[:, :rank] * root_R).bfloat16(), (root_R[:, None] * right[:rank]).bfloat16())


@dataclass(frozen=True)
class HalfWeight:
    """A matrix in bf16."""

    weight_OI: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.weight_OI.shape[0], self.weight_OI.shape[1]

    @property
    def nbytes(self) -> int:
        """As stored."""
        return self.weight_OI.numel() * self.weight_OI.element_size()

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by the names that a state dictionary has."""
        return {"bf16": self.weight_OI}

    def with_tensors(self, tensors: dict[str, Tensor]) -> HalfWeight:
        """The same with other `tensors` of the same shapes."""
        return HalfWeight(tensors["bf16"])

    def dequantize(self) -> Tensor:
        """weight_OI in fp32."""
        return self.weight_OI.float()
