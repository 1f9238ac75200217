"""Speed: peak and achieved FLOP/s, and tokens per second beside what the memory's bandwidth allows. Floors are low: it
takes a wrong kernel to miss them, not a slow day; the figures are what counts. On the CPU nothing is asserted.
"""

from __future__ import annotations

import pytest
import torch

from escala.planning.cost import kv_cache_bytes_per_token
from escala.schema import ModelConfig, TrainingConfig
from escala.schema.flops import flops_per_token
from tests.gpu.checks import normal, rounded, seconds, tokens_of
from tests.gpu.figures import Figures
from tests.gpu.training import PlainEngine, gradient
from workloads.generation.engine import Engine
from workloads.generation.protocol import SamplingParams
from workloads.model.attention import make_attention
from workloads.model.transformer import Transformer
from workloads.training.meter import peak_flops

pytestmark = pytest.mark.gpu
# NVIDIA's data sheets of the H100 and H200 (SXM): dense, without sparsity.
SHEET = {torch.bfloat16: 989e12, torch.float32: 67e12}
HOPPER = ("H100", "H200")
LEAST_OF_SHEET, LEAST_MFU, LEAST_OF_BOUND = 0.4, 0.15, 0.02


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and any(name in torch.cuda.get_device_name() for name in HOPPER)


@pytest.mark.parametrize("dtype", SHEET, ids=["bf16", "fp32"])
def test_the_peak(dtype: torch.dtype, device: torch.device, figures: Figures) -> None:
    """What MFU is relative to: it must be the device's own, not the clock's resolution."""
    found = peak_flops(dtype, device)
    share = found / SHEET[dtype]
    beside = f"{share:.0%} of the data sheet" if is_hopper(device) else ""
    figures.add(f"matmul peak, {str(dtype)[6:]}", f"{found / 1e12:.3g} TFLOP/s", beside)
    if is_hopper(device):
        assert LEAST_OF_SHEET <= share <= 1.05


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training(precision: str, device: torch.device, figures: Figures, alone: None) -> None:
    """Whole steps, clipping and AdamW included. On a card 335 M parameters, 16,384 tokens a step (fp32: 4,096)."""
    on_card, dtype = device.type == "cuda", torch.bfloat16 if precision == "bf16" else torch.float32
    layers, width, vocabulary, context = (24, 1024, 32768, 1024) if on_card else (2, 128, 512, 64)
    batch = (16 if precision == "bf16" else 4) if on_card else 2
    shape = ModelConfig(
        vocab_size=vocabulary,
        n_layers=layers,
        d_model=width,
        n_heads=width // 64,
        max_context_tokens=context,
    )
    model = Transformer(shape).to(device, dtype)
    engine = PlainEngine(model, TrainingConfig.model_validate({"precision": precision}))
    tokens = tokens_of(vocabulary, batch, context + 1).to(device)

    def step() -> None:
        gradient(engine, tokens)
        engine.update(1e-4)

    lap = seconds(step, device, repeats=8 if on_card else 1)
    reached = flops_per_token(shape, context).total * batch * context / lap
    share = reached / peak_flops(dtype, device)
    figures.add(f"training, {precision}: tokens/s", f"{batch * context / lap:,.0f}", f"{lap:.3f} s a step")
    figures.add(f"training, {precision}: FLOP/s", f"{reached / 1e12:.3g} TFLOP/s", f"MFU {share:.1%}")
    if is_hopper(device):
        assert LEAST_MFU <= share <= 1


@pytest.mark.parametrize("kind", ["exact", "window", "features", "hybrid"])
def test_attention(kind: str, device: torch.device, figures: Figures, alone: None) -> None:
    """Forward and backward of one layer, one sequence in bf16, 16 heads of 64; window 512, 256 features. Not run on a
    GPU yet, so no floors.
    """
    context = 32_768 if device.type == "cuda" else 1024

    def lap(of: str) -> float:
        window = {"window_tokens": 512} if of in ("window", "hybrid") else {}
        shape = {"d_model": 1024, "n_heads": 16, "max_context_tokens": context, "attention": of, **window}
        core = make_attention(ModelConfig.model_validate(shape)).to(device, torch.bfloat16)
        q, k, v = (rounded(normal(1, context, 16, 64, seed=n), device, torch.bfloat16) for n in range(3))
        prepared = core.prepare(context, None, device)
        work = lambda: core(q, k, v, prepared=prepared).sum().backward()  # noqa: E731
        return seconds(work, device, repeats=8 if device.type == "cuda" else 1)

    found = lap(kind)
    beside = "" if kind == "exact" else f"{lap('exact') / found:.2f} of exact's speed"
    figures.add(
        f"attention {kind}, bf16, T {context:,}: forward and backward", f"{found * 1e3:.3g} ms", beside
    )


@pytest.mark.parametrize("batch", [1, 32])
def test_generation(batch: int, device: torch.device, figures: Figures) -> None:
    """Greedy, bf16, prompts of 128 tokens and responses of 128; on a card 1.3 billion parameters. The bound: a step
    reads the weights once, a token its keys and values once.
    """
    on_card = device.type == "cuda"
    layers, width, vocabulary, length = (24, 2048, 32768, 128) if on_card else (2, 128, 512, 16)
    shape = ModelConfig(
        vocab_size=vocabulary,
        n_layers=layers,
        d_model=width,
        n_heads=width // 64,
        n_kv_heads=max(1, width // 256),
        max_context_tokens=2 * length,
    )
    with torch.device(device):  # a billion random numbers take the CPU a minute
        model = Transformer(shape).to(torch.bfloat16)
    engine = Engine(model, None, max_running=32, prefill_tokens=4096, threads=None)
    params = SamplingParams(max_tokens=length, temperature=0)
    seed = iter(range(1_000_000))

    def run() -> None:  # other prompts each time: none is in the prefix cache
        prompts = [tokens_of(vocabulary, length, seed=next(seed)).tolist() for _ in range(batch)]
        engine.generate(prompts, params)

    lap = seconds(run, device, repeats=2 if on_card else 1)
    speed = batch * length / lap
    weights = sum(p.nbytes for p in model.parameters())
    cache = kv_cache_bytes_per_token(shape, 2) * batch * (1.5 * length)  # the mean context
    allowed = batch / ((weights + cache) / bandwidth(device))
    figures.add(
        f"generation, bf16, batch {batch}: tokens/s",
        f"{speed:,.0f}",
        f"{speed / allowed:.1%} of the bandwidth's {allowed:,.0f}",
    )
    if is_hopper(device):
        assert LEAST_OF_BOUND <= speed / allowed <= 1


def bandwidth(device: torch.device) -> float:
    """Bytes per second of c = a + b on arrays beyond any cache (McCalpin's STREAM, 1995)."""
    elements = 1 << (28 if device.type == "cuda" else 22)
    a, b = torch.ones(elements, device=device), torch.ones(elements, device=device)
    c = torch.empty_like(a)
    return 12 * elements / seconds(lambda: torch.add(a, b, out=c), device, repeats=10)
