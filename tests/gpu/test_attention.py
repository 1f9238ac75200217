"""Every kind of attention, and every kernel that may be chosen for it, forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from escala.schema import ModelConfig
from tests.gpu.checks import CPU, assert_near_cpu, each_precision, normal, rounded
from tests.gpu.memory import peak_bytes
from workloads.model.attention import exact, flex, make_attention
from workloads.model.attention.layout import packing, split_heads
from workloads.model.attention.local import Band, local_attention, stepwise

pytestmark = pytest.mark.gpu
KINDS = ("exact", "window", "features", "hybrid", "nystrom")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_packing = pytest.mark.parametrize("packed", [False, True], ids=["one", "documents"])
each_heads = pytest.mark.parametrize("kv_heads", [4, 2], ids=["all-heads", "grouped"])
ROWS, HEADS, SIZE = 2, 4, 64


def attention(
    kind: str, packed: bool, kv_heads: int, context: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output and the gradients of queries, keys and values."""
    window = {} if kind in ("exact", "features") else {"window_tokens": context // 10 * 2}
    config = ModelConfig.model_validate(
        {
            "d_model": HEADS * SIZE,
            "n_heads": HEADS,
            "n_kv_heads": kv_heads,
            "max_context_tokens": context,
            "attention": {"kind": kind, "landmarks": 4} if kind == "nystrom" else kind,
            **window,
        }
    )
    core = make_attention(config).to(device, dtype)
    shapes = [(ROWS, context, heads, SIZE) for heads in (HEADS, kv_heads, kv_heads)]
    q, k, v = (rounded(normal(*shape, seed=n), device, dtype) for n, shape in enumerate(shapes))
    out = core(q, k, v, documents_of(context).to(device) if packed else None)
    out.backward(rounded(normal(*out.shape, seed=9), device, dtype).detach())
    return {"out": out.detach(), **{n: x.grad for n, x in zip("qkv", (q, k, v), strict=True)}}


def documents_of(context: int) -> Tensor:
    """Three in one row, seven in the other, (ROWS, context)."""
    return torch.arange(context).expand(ROWS, -1) * torch.tensor([[3], [7]]) // context


@each_kind
@each_packing
@each_heads
@each_precision
@pytest.mark.parametrize("context", [96, 301])
def test_the_kernel_that_is_chosen(
    kind: str, packed: bool, kv_heads: int, context: int, device: torch.device, dtype: torch.dtype
) -> None:
    assert_near_cpu(lambda *where: attention(kind, packed, kv_heads, context, *where), device, dtype)


@each_packing
@each_heads
@each_precision
@pytest.mark.parametrize(("window", "block"), [(70, None), (None, 64)], ids=["window", "blocks"])
def test_flex_attention(
    window: int | None,
    block: int | None,
    kv_heads: int,
    packed: bool,
    device: torch.device,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not run on a GPU yet. Its output, log-sum-exp and gradients, also through the log-sum-exp, beside the steps'."""
    calls, plain = [], flex.flex_local
    monkeypatch.setattr("workloads.model.attention.local.flex_local", lambda *a: calls.append(1) or plain(*a))

    def work(at: torch.device, kind: torch.dtype) -> dict[str, Tensor]:
        shapes = [(ROWS, 301, heads, SIZE) for heads in (HEADS, kv_heads, kv_heads)]
        q, k, v = (rounded(normal(*shape, seed=n), at, kind) for n, shape in enumerate(shapes))
        documents = documents_of(301).to(at) if packed else None
        band = Band(packing(301, documents, at), window, block)
        local = stepwise if at == CPU else local_attention
        out, lse = local(*split_heads(q, k, v), band)
        torch.autograd.backward(
            (out, lse), (normal(*out.shape, seed=8).to(out), normal(*lse.shape, seed=9).to(lse))
        )
        return {"out": out.detach(), "lse": lse.detach(), "q": q.grad, "k": k.grad, "v": v.grad}

    assert_near_cpu(work, device, dtype)
    assert len(calls) == (1 if device.type == "cuda" else 0)


@each_packing
@each_heads
@each_precision
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])
def test_each_kernel_of_sdpa(
    packed: bool,
    kv_heads: int,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exact, "_flash", lambda: None)

    def work(at: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        only: AbstractContextManager[Any] = nullcontext()
        if at != CPU:
            only = sdpa_kernel(getattr(SDPBackend, backend))
        with only:
            return attention("exact", packed, kv_heads, 256, at, dtype)

    try:
        work(device, dtype)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        pytest.skip(f"{backend} does not take this")
    assert_near_cpu(work, device, dtype)


@pytest.mark.parametrize("kind", ["exact", "window"])
@each_packing
@each_heads
def test_flash_attn(
    kind: str, packed: bool, kv_heads: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package, where it is installed: it takes bf16, and no documents."""
    if exact._flash() is None:
        pytest.skip("flash-attn is not installed")
    calls, plain = [], exact._flash().flash_attn_func
    monkeypatch.setattr(exact._flash(), "flash_attn_func", lambda *a, **k: calls.append(1) or plain(*a, **k))
    assert_near_cpu(lambda *where: attention(kind, packed, kv_heads, 301, *where), device, torch.bfloat16)
    assert len(calls) == (0 if packed or device.type == "cpu" else 1)


@each_kind
@each_packing
@each_heads
@each_precision
def test_scores_are_not_kept(
    kind: str, packed: bool, kv_heads: int, device: torch.device, dtype: torch.dtype
) -> None:
    """The memory of a step grows with the context, not with its square times heads: no fallback to plain products. A
    mask of all pairs, once for all heads, is allowed.
    """
    context = 4096 if device.type == "cuda" else 512
    work = lambda: attention(kind, packed, kv_heads, context, device, dtype)  # noqa: E731
    found, item = peak_bytes(work, device), dtype.itemsize
    linear = (24 if kind == "exact" else 40) * ROWS * context * HEADS * SIZE * max(4, item)
    masks = ROWS * context * context * (3 * item + 4) if packed and kind == "exact" else 0
    scores = ROWS * HEADS * context * context * item
    assert found < linear + masks + scores / 2
