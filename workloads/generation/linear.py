"""y = x W^T with the weight laid out once for many small batches.

Dimensions: N rows, I inputs, O outputs.

On CPU oneDNN's packed layout is 1.4 to 1.9 times as fast as `F.linear` at 1 to 32 rows (measured, fp32 and bf16, one
thread), and adds up each row in the same order however many rows there are, which MKL's does not below 4 rows.
One row alone is an exception (fp32, I = 1,600): `MIN_ROWS` keeps away from it, and 4 rows cost no more than 1.
bf16 on a CPU with AMX is another: more rows than the layout was made for are added up in another order, so they are
computed at most _BATCH_HINT at a time (256 rows take 1.3 to 2.4 times as long; AVX-512 alone takes 10 times).
Start the process with GLIBC_TUNABLES=glibc.malloc.hugetlb=1: 4 rows of 62 M parameters then take 14 ms instead of 20.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 4
_has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
_BATCH_HINT = 32  # rows for which oneDNN chooses the layout


class PackedLinear:
    """The product with `weight_OI`, which may be dropped by the caller afterwards."""

    def __init__(self, weight_OI: Tensor) -> None:
        weight_OI = weight_OI.detach()
        self._packs = weight_OI.device.type == "cpu" and _has_onednn()
        if self._packs:
            weight_OI = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _BATCH_HINT)
        self._weight = weight_OI
        self._in_parts = (
            self._packs and weight_OI.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        )

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, O) of (N, I)."""
        if not self._packs:
            return F.linear(x_NI, self._weight)
        if self._in_parts and len(x_NI) > _BATCH_HINT:
            parts = x_NI.tensor_split(-(-len(x_NI) // _BATCH_HINT))  # of equal size: none has too few rows
            return torch.cat([self._product(part) for part in parts])
        return self._product(x_NI)

    def _product(self, x_NI: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self._weight, None, "none", [], "")
        return product
