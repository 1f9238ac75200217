"""Exact attention by every kernel that may be chosen, forward and backward."""

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
from workloads.model.attention import exact, make_attention

pytestmark = pytest.mark.gpu
KINDS = ("causal", "window", "documents", "window-documents")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_heads = pytest.mark.parametrize("kv_heads", [4, 2], ids=["all-heads", "grouped"])
ROWS, HEADS, SIZE = 2, 4, 64


def attention(
    kind: str, kv_heads: int, context: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output and the gradients of queries, keys and values."""
    config = ModelConfig(
        d_model=HEADS * SIZE,
        n_heads=HEADS,
        n_kv_heads=kv_heads,
        max_context_tokens=context,
        window_tokens=context // 5 if "window" in kind else None,
    )
    core = make_attention(config)
    documents = None
    if "documents" in kind:
        places = torch.arange(context).expand(ROWS, -1)
        documents = (places * torch.tensor([[3], [7]]) // context).to(device)
    shapes = [(ROWS, context, heads, SIZE) for heads in (HEADS, kv_heads, kv_heads)]
    q, k, v = (rounded(normal(*shape, seed=n), device, dtype) for n, shape in enumerate(shapes))
    out = core.attend(q, k, v, core.prepare(context, documents, device))
    out.backward(rounded(normal(*out.shape, seed=9), device, dtype).detach())
    return {"out": out.detach(), **{n: x.grad for n, x in zip("qkv", (q, k, v), strict=True)}}


@each_kind
@each_heads
@each_precision
@pytest.mark.parametrize("context", [96, 301])
def test_the_kernel_that_is_chosen(
    kind: str, kv_heads: int, context: int, device: torch.device, dtype: torch.dtype
) -> None:
    assert_near_cpu(lambda *where: attention(kind, kv_heads, context, *where), device, dtype)


@each_kind
@each_heads
@each_precision
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])
def test_each_kernel_of_sdpa(
    kind: str,
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
            return attention(kind, kv_heads, 256, at, dtype)

    try:
        work(device, dtype)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        pytest.skip(f"{backend} does not take this")
    assert_near_cpu(work, device, dtype)


@each_kind
@each_heads
def test_flash_attn(kind: str, kv_heads: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, where it is installed: it takes bf16, and no documents."""
    if exact._flash() is None:
        pytest.skip("flash-attn is not installed")
    calls, plain = [], exact._flash().flash_attn_func
    monkeypatch.setattr(exact._flash(), "flash_attn_func", lambda *a, **k: calls.append(1) or plain(*a, **k))
    assert_near_cpu(lambda *where: attention(kind, kv_heads, 301, *where), device, torch.bfloat16)
    assert len(calls) == (0 if "documents" in kind or device.type == "cpu" else 1)


@each_kind
@each_heads
@each_precision
def test_scores_are_not_kept(kind: str, kv_heads: int, device: torch.device, dtype: torch.dtype) -> None:
    """The memory of a step grows with the context, not with its square times heads: no fallback to plain products. A
    mask of all pairs, once for all heads, is allowed.
    """
    context = 4096 if device.type == "cuda" else 512
    work = lambda: attention(kind, kv_heads, context, device, dtype)  # noqa: E731
    found, item = peak_bytes(work, device), dtype.itemsize
    linear = 24 * ROWS * context * HEADS * SIZE * max(4, item)
    masks = ROWS * context * context * (3 * item + 4) if kind != "causal" else 0
    scores = ROWS * HEADS * context * context * item
    assert found < linear + masks + scores / 2
