"""How fast each kind of attention is, by context: `python -m workloads.bench_attention ATTEMPT.json`. Reads top to
bottom.

One layer, one sequence, one worker. `forward` and `train` (forward and backward) call the attention alone; `decode` is
one token of a model of a few layers, divided by them: projections and what layers share included, the logits not.

Dimensions: B batch, T context, H query heads, G key/value heads, S head size.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from escala.contract.records import write_json
from escala.schema import AttentionBenchConfig, ModelConfig
from escala.tracking.lineage.lifecycle import LiveAttempt, run_attempt
from workloads.bench import device_name, run_bench
from workloads.generation.network import Network, TokenSpan
from workloads.model.attention import make_attention
from workloads.model.transformer import Transformer
from workloads.training import meter
from workloads.training.device import device_of, set_up_torch
from workloads.training.failures import classify

DECODE_LAYERS = 4  # what layers share (which blocks to read) is then as small a part as in a small model
BLOCK_TOKENS = 32  # of the cache, where a kind takes any: the engine's own
LEAST_CALLS = 3
LONG = 30


@dataclass(frozen=True)
class Timed:
    """A call, and in how many equal parts its time is told: of a decoder tokens x layers."""

    work: Callable[[], object]
    parts: int = 1


def main(arguments: list[str]) -> int:
    """Run one attempt; returns the process's exit code."""
    return run_attempt(arguments, bench, partial(classify, nodes=None))


def bench(attempt: LiveAttempt) -> None:
    """See `run_bench`."""
    run_bench(attempt, AttentionBenchConfig.model_validate, measure, "attention.json")


def measure(arguments: dict[str, Any]) -> None:
    """The one worker."""
    config = AttentionBenchConfig(**arguments["config"])
    device = device_of(config.resources)
    set_up_torch(config.resources)
    found: dict[str, Any] = {"device": device_name(device), "precisions": {}}
    print(meter.choose_matmul_precision("auto", device), flush=True)
    for name in config.precisions:
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        found["precisions"][name] = {kind: measure_kind(kind, config, device, dtype) for kind in config.kinds}
    write_json(Path(arguments["facts"]), found)


def measure_kind(
    kind: str, config: AttentionBenchConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The fields of a `KindSpeed`: seconds by context, and what is left out."""
    model = config.layer(kind)
    found: dict[str, Any] = {"left_out": []}
    sides: dict[str, Callable[[int], Timed]] = {
        "forward": lambda context: Timed(_forward(model, context, device, dtype)),
        "train": lambda context: Timed(_train(model, context, device, dtype)),
        "decode": lambda context: decoder(model, context, device, dtype),
    }
    for side, prepare in sides.items():
        found[side], reason = _by_context(prepare, side, model, config)
        if reason:
            found["left_out"].append(f"{side}: {reason}")
        print(f"{dtype} {kind} {side}: {found[side]} {reason}", flush=True)
    return found


def _by_context(
    prepare: Callable[[int], Timed],
    side: str,
    model: ModelConfig,
    config: AttentionBenchConfig,
) -> tuple[dict[int, float], str]:
    """Seconds by context, ascending, and why the rest is left out (empty: nothing is)."""
    seconds: dict[int, float] = {}
    for context in sorted(config.contexts):
        if seconds:
            last = max(seconds)
            growth = 1.0 if side == "decode" else _work(model, context) / _work(model, last)
            if seconds[last] * growth > config.max_call_seconds:
                limit = f"max_call_seconds {config.max_call_seconds:g}"
                return (
                    seconds,
                    f"at T {context} a call would take {seconds[last] * growth:.0f} s, above {limit}",
                )
        try:
            found = prepare(context)
            seconds[context] = _best_seconds(found.work, config.seconds, _clock(config)) / found.parts
        except torch.OutOfMemoryError:
            return seconds, f"at T {context} the device's memory is too small"
        finally:
            gc.collect()
    return seconds, ""


def _work(model: ModelConfig, context: int) -> float:
    return context * model.attention.flops(model, context)


def _best_seconds(work: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """The least of one call, over about `seconds`: other load only ever slows a call down. A call of more than
    LONG times that is made once.
    """
    laps = [_lap(work, clock)]
    while laps[0] < LONG * seconds and (len(laps) < LEAST_CALLS or sum(laps) < seconds):
        laps.append(_lap(work, clock))
    return min(laps)


def _lap(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def _clock(config: AttentionBenchConfig) -> Callable[[], float]:
    """One thread's own CPU time is what it takes on a quiet machine; of several threads, or a GPU, the wall's is."""
    resources = config.resources
    alone = resources.threads_per_worker == 1 and not resources.gpus_per_worker
    return time.process_time if alone else time.perf_counter


def _forward(
    model: ModelConfig, context: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    call = _attention(model, context, device, dtype)

    def forward() -> None:
        with torch.no_grad():
            call()

    return forward


def _train(
    model: ModelConfig, context: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    call = _attention(model, context, device, dtype)
    grad_BTHS = torch.randn(1, context, model.n_heads, model.head_size).to(device, dtype)
    return lambda: torch.autograd.backward(call(), grad_BTHS)


def _attention(
    model: ModelConfig, context: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    core = make_attention(model).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (1, context, model.n_heads, model.head_size)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
    prepared = core.prepare(context, None, device)

    def call() -> torch.Tensor:
        for x in (q, k, v):
            x.grad = None
        out_BTHS: torch.Tensor = core(q, k, v, prepared=prepared)
        return out_BTHS

    return call


def decoder(model: ModelConfig, context: int, device: torch.device, dtype: torch.dtype) -> Timed:
    """From position `context` on, as many tokens as a block has: so what is due at a block's border counts once. The
    state is empty: what it holds changes no time.
    """
    block = model.attention.block_tokens(model) or BLOCK_TOKENS
    whole = model.model_copy(update={"n_layers": DECODE_LAYERS, "max_context_tokens": context + block})
    network = Network(Transformer(whole).to(device, dtype))
    places = -(-(context + block) // block)
    live = model.attention.live_blocks(model, block)
    blocks = places if live is None else min(places, live + 1)
    table = [0] * (places - blocks) + list(range(blocks))  # what is no longer needed is not read
    with torch.inference_mode():
        state = network.decode_state(blocks, block)

    @torch.inference_mode()
    def decode() -> None:
        for position in range(context, context + block):
            network.forward([TokenSpan([0], position, table)], state, tiled=False)

    return Timed(decode, block * DECODE_LAYERS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
