"""Ways to compute y = x W^T for a matrix that was laid out once: kernels, and when each may be used.

Dimensions: N rows, I inputs, O outputs.

Which is fastest depends on the CPU, the number of rows and how the matrix is stored, so `kernel_choice` measures it.
Figures of one thread of an AMD EPYC (AVX2, no bf16 arithmetic), of `F.linear` in fp32:

packed    oneDNN's layout: 0.8 to 0.9 times as fast at 1 row, 1.2 to 1.4 at 4 to 8, 1.0 at 32 and more.
halves    FBGEMM's fp16 matrices, fp32 products and sums: 2.2 at 1 row, 4 at 4, 1.5 at 32, 1.0 at 128. Codes of 8 bits
          are exact in fp16, other stored matrices are rounded to 11 bits. 2 bytes a weight, whatever the codes take.
int8pack  int8 codes read as they are, activations in bf16: 1.4 to 1.8 at 1 row, 0.6 at 32, 0.4 at 128.
int4pack  4-bit codes likewise: 1.6 to 2.3 at 1 row, 0.6 at 32.
plain     the matrix as it is, made whole for each call where it is stored smaller: 1.2 at 1 row, 0.8 at 128 (8 bits).
vector    row by row: what MKL does fastest for one row, and nothing for more.

Start the process with GLIBC_TUNABLES=glibc.malloc.hugetlb=1: 4 rows of 62 M parameters then take 14 ms instead of 20.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.generation.row_counts import cancelling_numbers
from workloads.model.compression.low_rank import HalfWeight
from workloads.model.compression.quantized import SIGNED_BITS, QuantizedWeight, pack_codes

Matrix = Tensor | QuantizedWeight | HalfWeight
"""weight_OI, dense in the model's dtype or stored smaller."""
Multiply = Callable[[Tensor], Tensor]
_has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
_BATCH_HINT = 32  # rows for which oneDNN chooses the layout
_PACK_GROUPS = (32, 64, 128, 256)  # of _weight_int4pack_mm_for_cpu
_ZERO_CODE = 8  # its codes are read as (code - 8) * scale + zero


@dataclass(frozen=True)
class Laid:
    """A matrix as a kernel has it.

    Args:
        multiply: (N, O) of (N, I), in x's dtype.
        nbytes: that it holds beside the matrix as it was given.
        reads_matrix: whether it reads the matrix as it was given, which must then stay.
    """

    multiply: Multiply
    nbytes: int
    reads_matrix: bool


@dataclass(frozen=True)
class Kernel:
    """A way to multiply by matrices.

    Args:
        takes: whether it can, here.
        lay: makes one ready.
        by_rows: it computes each row alone, so that the others can't change it.
    """

    name: str
    takes: Callable[[Matrix], bool]
    lay: Callable[[Matrix], Laid]
    by_rows: bool = False


def form_of(matrix: Matrix) -> str:
    """How a matrix is stored: fp32, bf16 (dense, in the model's dtype), int8, int8g32, int4g128, half, ..."""
    if isinstance(matrix, QuantizedWeight):
        group = "" if matrix.group == matrix.shape[1] else f"g{matrix.group}"
        return f"int{matrix.bits}{group}"
    if isinstance(matrix, HalfWeight):
        return "half"
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(matrix.dtype, str(matrix.dtype))


def on_cpu(matrix: Matrix) -> bool:
    """Where it lies."""
    if isinstance(matrix, Tensor):
        return matrix.device.type == "cpu"
    return next(iter(matrix.tensors().values())).device.type == "cpu"


def cancelling(matrix: Matrix) -> Matrix:
    """One of the same shape that is stored in the same way, of `cancelling_numbers`."""
    outputs, inputs = matrix.shape
    if not isinstance(matrix, QuantizedWeight):
        numbers_OI = cancelling_numbers(outputs, inputs, 127)
        if isinstance(matrix, Tensor):
            return numbers_OI.to(matrix.dtype)
        return HalfWeight(numbers_OI.to(matrix.weight_OI.dtype))
    middle, scale_OG = 1 << (matrix.bits - 1), torch.ones_like(matrix.scale_OG)
    codes_OI = cancelling_numbers(outputs, inputs, middle - 1)
    if matrix.offset_OG is None:
        return matrix.with_tensors({"codes": codes_OI, "scale": scale_OG})
    codes = pack_codes((codes_OI + middle).to(torch.uint8), matrix.bits)
    offset_OG = torch.full_like(matrix.offset_OG, -middle)
    return matrix.with_tensors({"codes": codes, "scale": scale_OG, "offset": offset_OG})


def _plain(matrix: Matrix) -> Laid:
    if isinstance(matrix, Tensor):
        return Laid(lambda x_NI: F.linear(x_NI, matrix), 0, True)
    return Laid(lambda x_NI: F.linear(x_NI, matrix.dequantize().to(x_NI.dtype)), 0, True)


def _vector(matrix: Matrix) -> Laid:
    whole = _plain(matrix)

    def multiply(x_NI: Tensor) -> Tensor:
        if len(x_NI) == 1:
            return whole.multiply(x_NI)
        return torch.cat([whole.multiply(x_1I) for x_1I in torch.split(x_NI, 1)])

    return Laid(multiply, 0, True)


def _packed(matrix: Matrix) -> Laid:
    assert isinstance(matrix, Tensor)
    laid = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), _BATCH_HINT)
    product = torch.ops.mkldnn._linear_pointwise
    return Laid(lambda x_NI: product(x_NI, laid, None, "none", [], ""), matrix.nbytes, False)


def _halves(matrix: Matrix) -> Laid:
    """The matrix in fp16 but for a factor of each output: a quantised one's own scale, else a power of two."""
    assert not isinstance(matrix, Tensor)
    if isinstance(matrix, QuantizedWeight) and matrix.scale_OG.shape[1] == 1 and matrix.offset_OG is None:
        scale_O, half_OI = matrix.scale_OG.float().squeeze(1), matrix.codes.float()
    else:
        half_OI = matrix.dequantize()
        scale_O = torch.ldexp(torch.ones(len(half_OI)), torch.frexp(half_OI.abs().amax(1)).exponent)
        half_OI = half_OI / scale_O.unsqueeze(1)
    laid, bias_O = _fp16_pack(half_OI), torch.zeros(len(half_OI))

    def multiply(x_NI: Tensor) -> Tensor:
        product: Tensor = torch.fbgemm_linear_fp16_weight_fp32_activation(x_NI.float(), laid, bias_O)
        return product.mul_(scale_O).to(x_NI.dtype)

    return Laid(multiply, 2 * half_OI.numel(), False)


def _fp16_pack(half_OI: Tensor) -> Tensor:
    """FBGEMM's layout. torch warns once of both functions, that a later torch will lack them; ours is pinned."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fbgemm_.* is deprecated")
        laid: Tensor = torch.fbgemm_pack_gemm_matrix_fp16(half_OI.contiguous())
        x_1I, bias_O = torch.zeros(1, half_OI.shape[1]), torch.zeros(len(half_OI))
        torch.fbgemm_linear_fp16_weight_fp32_activation(x_1I, laid, bias_O)
    return laid


def _has_fbgemm(matrix: Matrix) -> bool:
    return (
        not isinstance(matrix, Tensor)
        and on_cpu(matrix)
        and hasattr(torch, "fbgemm_linear_fp16_weight_fp32_activation")
        and "fbgemm" in torch.backends.quantized.supported_engines
    )


def _int8pack(matrix: Matrix) -> Laid:
    assert isinstance(matrix, QuantizedWeight)
    codes_OI, scale_O = matrix.codes, matrix.scale_OG.squeeze(1).bfloat16()
    product = torch.ops.aten._weight_int8pack_mm
    return Laid(lambda x_NI: product(x_NI.bfloat16(), codes_OI, scale_O).to(x_NI.dtype), 0, True)


def _takes_int8pack(matrix: Matrix) -> bool:
    return (
        isinstance(matrix, QuantizedWeight)
        and on_cpu(matrix)
        and (matrix.bits, matrix.scale_OG.shape[1]) == (SIGNED_BITS, 1)
        and matrix.shape[1] % 32 == 0  # others end the process (torch 2.13: I = 33, 34, 36, 62)
    )


def _int4pack(matrix: Matrix) -> Laid:
    assert isinstance(matrix, QuantizedWeight)
    assert matrix.offset_OG is not None
    group, scale_OG = matrix.group, matrix.scale_OG.float()
    middle = 2 ** (matrix.bits - 1)
    codes_OI = matrix.unpacked_OI().int() + (_ZERO_CODE - middle)
    laid = torch._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
    zero_OG = matrix.offset_OG.float() + middle * scale_OG  # small, so that bf16 rounds it little
    scales_GO2 = torch.stack((scale_OG.t(), zero_OG.t()), -1).bfloat16().contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Laid(
        lambda x_NI: product(x_NI.bfloat16(), laid, group, scales_GO2).to(x_NI.dtype),
        laid.nbytes + scales_GO2.nbytes,
        False,
    )


def _takes_int4pack(matrix: Matrix) -> bool:
    return (
        isinstance(matrix, QuantizedWeight)
        and on_cpu(matrix)
        and matrix.bits <= 4
        and matrix.group in _PACK_GROUPS
        and matrix.shape[0] % 16 == 0
    )


def _takes_packed(matrix: Matrix) -> bool:
    if not isinstance(matrix, Tensor) or not on_cpu(matrix) or not _has_onednn():
        return False
    return matrix.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("packed", _takes_packed, _packed),
        Kernel("halves", _has_fbgemm, _halves),
        Kernel("int8pack", _takes_int8pack, _int8pack),
        Kernel("int4pack", _takes_int4pack, _int4pack),
        Kernel("plain", lambda matrix: True, _plain),
        Kernel("vector", lambda matrix: True, _vector, by_rows=True),
    )
}
"""By name. Where nothing is measured, the first that takes a matrix, with a result that the batch does not change."""
