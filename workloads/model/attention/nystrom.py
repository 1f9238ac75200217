"""Exact attention over two blocks, landmarks of each past block beyond, one normaliser (docs/theory A.5, A.7).

Of each block c the tokens with the largest ridge leverage scores are its landmarks L_c (Musco & Musco 2017, eq. 2); its
keys are summed as M_c = (kappa(L_c, L_c) + ridge I)^-1 sum_j kappa(L_c, y_j) [v_j, 1], kappa(a, b) = e^(a.b).

Dimensions: B batch, T context, G key/value heads, E query heads of each, N = B * G, S head size, C tokens of a block, P
landmarks of a block, V = S + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from escala.schema import ModelConfig
from escala.schema.attention.nystrom import NystromAttention
from workloads.model.attention.features import at_least, far_keys
from workloads.model.attention.hybrid import NearAndFar
from workloads.model.attention.local import Band
from workloads.model.attention.registry import DecodeState


class Nystrom(NearAndFar):
    """The far part by landmarks: every query meets those of every past block, T^2 landmarks / S in all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        section = config.attention
        if not isinstance(section, NystromAttention):
            raise TypeError(f"attention {section.kind} has no landmarks")
        self.landmarks, self.ridge = section.landmarks, section.ridge

    def far(
        self, x_NETS: Tensor, y_NTS: Tensor, v_NTS: Tensor, temperature_N: Tensor, band: Band
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See NearAndFar."""
        packed, size = band.packing, self.block_tokens
        context, documents_BT = packed.context_tokens, packed.documents_BT
        heads = len(y_NTS) if documents_BT is None else len(y_NTS) // len(documents_BT)
        landmarks, sums, last = [], [], []
        found = [
            torch.zeros_like(x_NETS[..., :1]).expand(*x_NETS.shape[:3], v_NTS.shape[-1] + 1)[:, :, : 2 * size]
        ]
        for start in range(2 * size, context, size):
            past = slice(start - 2 * size, start - size)
            joins_NC = None
            if documents_BT is not None:
                last_B1 = documents_BT[:, past.stop - 1, None]
                last.append(last_B1)
                joins_NC = packed.of_heads(documents_BT[:, past] == last_B1, heads)
            landmarks_NPS, sums_NPV = summary(
                y_NTS[:, past], v_NTS[:, past], self.landmarks, self.ridge, joins_NC
            )
            landmarks.append(landmarks_NPS)
            sums.append(sums_NPV)
            queries = slice(start, min(start + size, context))
            reads = None
            if documents_BT is not None:
                same_BTP = documents_BT[:, queries, None] == torch.cat(last, 1)[:, None]
                reads = packed.of_heads(same_BTP.repeat_interleave(self.landmarks, 2), heads)
            found.append(
                checkpoint(
                    read_landmarks,
                    x_NETS[:, :, queries],
                    torch.cat(landmarks, 1),
                    torch.cat(sums, 1),
                    reads,
                    use_reentrant=False,
                )
            )
        total = torch.cat(found, 2)
        count_BT = far_keys(packed, size)
        count_NT = packed.of_heads(count_BT, heads).expand(len(y_NTS), -1)
        denominator = at_least(total[..., -1], count_NT, temperature_N)
        return total[..., :-1], denominator.masked_fill(count_NT[:, None] == 0, 1.0), None

    def decode_state(self, blocks: int, block_tokens: int, like: Tensor) -> DecodeState:
        """Keys and values, and the landmarks of each block."""
        raise NotImplementedError


def summary(
    y_NCS: Tensor, v_NCS: Tensor, landmarks: int, ridge: float, joins_NC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(landmarks_NPS, sums_NPV) of a block: L_c and M_c; `joins_NC`: the tokens that count, None: all.

    A landmark that does not count, where a block has fewer tokens that do, has the sum 0.
    """
    kernel_NCC = torch.bmm(y_NCS, y_NCS.transpose(1, 2)).exp()
    index_NP = chosen(kernel_NCC.detach(), landmarks, ridge, joins_NC)
    rows_NPC = kernel_NCC.take_along_dim(index_NP.unsqueeze(-1), 1)
    values_NCV = torch.nn.functional.pad(v_NCS.to(y_NCS.dtype), (0, 1), value=1.0)
    inner_NPP = rows_NPC.take_along_dim(index_NP.unsqueeze(1), 2)
    eye = torch.eye(landmarks, dtype=y_NCS.dtype, device=y_NCS.device)
    if joins_NC is not None:
        counts_NP = joins_NC.take_along_dim(index_NP, 1)
        rows_NPC = rows_NPC * joins_NC.unsqueeze(1) * counts_NP.unsqueeze(-1)
        inner_NPP = inner_NPP * counts_NP.unsqueeze(1) * counts_NP.unsqueeze(2) + eye * ~counts_NP.unsqueeze(
            -1
        )
    factor = torch.linalg.cholesky(inner_NPP + ridge * eye)
    sums_NPV = torch.cholesky_solve(torch.bmm(rows_NPC, values_NCV), factor)
    return y_NCS.take_along_dim(index_NP.unsqueeze(-1), 1), sums_NPV


def chosen(kernel_NCC: Tensor, landmarks: int, ridge: float, joins_NC: Tensor | None) -> Tensor:
    """(N, P): the tokens with the largest ridge leverage scores, [K (K + ridge I)^-1]_jj, of those that count."""
    tokens = kernel_NCC.shape[-1]
    if landmarks == tokens:
        return torch.arange(tokens, device=kernel_NCC.device).expand(len(kernel_NCC), -1)
    eye = torch.eye(tokens, dtype=kernel_NCC.dtype, device=kernel_NCC.device)
    if joins_NC is not None:
        kernel_NCC = kernel_NCC * joins_NC.unsqueeze(1) * joins_NC.unsqueeze(2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel_NCC + max(ridge, LEAST_RIDGE) * eye))
    rest_NC = inverse.diagonal(dim1=1, dim2=2)  # (1 - score) / ridge
    if joins_NC is not None:
        rest_NC = rest_NC.masked_fill(~joins_NC, float("inf"))
    return rest_NC.topk(landmarks, largest=False).indices


LEAST_RIDGE = 1e-3  # of the scores: with 0 all tokens score 1


def read_landmarks(x_NECS: Tensor, landmarks_NPS: Tensor, sums_NPV: Tensor, reads: Tensor | None) -> Tensor:
    """(N, E, C, V): kappa(x, L) M over all landmarks, or over those that a query `reads` (N, C, P)."""
    weights = torch.bmm(x_NECS.flatten(1, 2), landmarks_NPS.transpose(1, 2)).exp()
    weights = weights.view(*x_NECS.shape[:3], -1)
    if reads is not None:
        weights = weights * reads.unsqueeze(1)
    found = torch.bmm(weights.flatten(1, 2), sums_NPV)
    return found.view(*x_NECS.shape[:3], -1)


make_attention = Nystrom
