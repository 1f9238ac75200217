"""Attention that does not grow with T squared, forward and backward, beside torch's SDPA in the same process.

One layer of 4 heads of 64, one sequence in fp32, one thread; window 512, 256 positive features. What is measured:
how many times SDPA's speed at T = 32,768; the exponent of time and of memory from T = 8,192 to 65,536; and how long the
next token takes at T = 32,768 in a model of 4 layers, beside exact. CPU time, the least of a few calls: other load only
ever slows a call down. One line a figure; exit code 1 where a floor is missed.

    python benchmarks/attention.py [--precision highest] [--skip-decode]
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from escala.schema import AttentionBenchConfig
from workloads.bench_attention import DECODE_LAYERS, decoder
from workloads.model.attention import make_attention
from workloads.training.driver import allocator
from workloads.training.meter import give_back_memory

LONG, CONTEXTS = 32_768, (8_192, 16_384, 32_768, 65_536)
SPEED_FLOORS = {"window": 12.0, "hybrid": 6.0}  # times SDPA's
MOST_GROWTH = 1.10  # exponent of T, of time and of memory
LINEAR = ("window", "hybrid", "features")
DECODE_FLOORS = {"features": 4.0, "hybrid": 4.0}  # times exact's speed
MOST_DECODE_GROWTH = 1.15  # of a token's time at T over that at T / 4: constant, and what a clock is worth
LAPS, MOST_SECONDS = 3, 15.0  # of calls that take long there is one


def main() -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="highest", choices=["highest", "medium"])
    parser.add_argument("--skip-decode", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(options.precision)
    torch.use_deterministic_algorithms(True)  # as in training
    torch.utils.deterministic.fill_uninitialized_memory = False
    config = AttentionBenchConfig(contexts=list(CONTEXTS), window_tokens=512, features=256)
    good = speed(config)
    if not options.skip_decode:
        good &= decode(config)
    return 0 if good else 1


def speed(config: AttentionBenchConfig) -> bool:
    """Beside SDPA, and how time and memory grow."""
    measure(sdpa_step(1024))  # what the first call of a process sets up
    sdpa, _ = measure(sdpa_step(LONG))
    print(f"SDPA, T {LONG}: {sdpa:.2f} s", flush=True)
    good = True
    for kind in LINEAR:
        measure(step(config, kind, 1024))
        found = {context: measure(step(config, kind, context)) for context in CONTEXTS}
        ratio, floor = sdpa / found[LONG][0], SPEED_FLOORS.get(kind)
        times = {context: seconds for context, (seconds, _) in found.items()}
        bytes_ = {context: float(size) for context, (_, size) in found.items()}
        time_growth, memory_growth = growth(times), growth(bytes_)
        good &= ratio >= (floor or 0.0) and max(time_growth, memory_growth) <= MOST_GROWTH
        print(
            f"{kind}, T {LONG}: {times[LONG]:.2f} s, {ratio:.1f} times SDPA's speed "
            f"({f'floor {floor:g}' if floor else 'no floor'}); time T^{time_growth:.3f}, memory T^{memory_growth:.3f} "
            f"(at most T^{MOST_GROWTH:.2f}); "
            + ", ".join(f"{c}: {s:.2f} s {bytes_[c] / 1e6:.0f} MB" for c, s in times.items()),
            flush=True,
        )
    return good


def decode(config: AttentionBenchConfig) -> bool:
    """The next token at LONG, beside exact's, and beside itself at a quarter of the context."""
    calls = {
        kind: decoder(config.layer(kind), LONG, torch.device("cpu"), torch.float32) for kind in DECODE_FLOORS
    }
    exact = decoder(config.layer("exact"), LONG, torch.device("cpu"), torch.float32)
    slow = min(lap(exact.work) for _ in range(LAPS)) * DECODE_LAYERS / exact.parts
    good = True
    for kind, call in calls.items():
        short = decoder(config.layer(kind), LONG // 4, torch.device("cpu"), torch.float32)
        fast = min(lap(call.work) for _ in range(LAPS)) * DECODE_LAYERS / call.parts
        growing = fast / (min(lap(short.work) for _ in range(LAPS)) * DECODE_LAYERS / short.parts)
        good &= slow / fast >= DECODE_FLOORS[kind] and growing <= MOST_DECODE_GROWTH
        print(
            f"{kind}, next token at T {LONG}: {fast * 1e3:.2f} ms, exact {slow * 1e3:.2f} ms, ratio {slow / fast:.1f} "
            f"(floor {DECODE_FLOORS[kind]:g}); {growing:.2f} times that at T {LONG // 4} (at most "
            f"{MOST_DECODE_GROWTH})",
            flush=True,
        )
    return good


def growth(found: dict[int, float]) -> float:
    """The exponent of T between the shortest and the longest context."""
    low, high = min(found), max(found)
    return math.log(found[high] / found[low]) / math.log(high / low)


def measure(work: Callable[[], object]) -> tuple[float, int]:
    """(CPU seconds of the fastest call, the most resident memory that a call adds)."""
    gc.collect()
    before = reset_peak()
    laps = [lap(work)]
    while len(laps) < LAPS and sum(laps) < MOST_SECONDS:
        laps.append(lap(work))
    return min(laps), peak() - before


def lap(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def reset_peak() -> int:
    """Let Linux count the peak from here; resident bytes now (man 5 proc, clear_refs). What glibc keeps goes first."""
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def peak() -> int:
    """The most resident bytes since `reset_peak`."""
    return memory("VmHWM")


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def step(config: AttentionBenchConfig, kind: str, context: int) -> Callable[[], object]:
    """Forward and backward of our module; its inputs and gradients are made in each call, so that all memory counts."""
    core = make_attention(config.layer(kind))
    return lambda: torch.autograd.backward(*_sides(core, context))


def _sides(core: Callable[..., Tensor], context: int) -> tuple[Tensor, Tensor]:
    q, k, v = inputs(context)
    out_BTHS = core(q, k, v)
    return out_BTHS, torch.ones_like(out_BTHS)


def sdpa_step(context: int) -> Callable[[], object]:
    """The same by SDPA."""

    def attend(q_BTHS: Tensor, k_BTHS: Tensor, v_BTHS: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHS, k_BTHS, v_BTHS))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return lambda: torch.autograd.backward(*_sides(attend, context))


def inputs(context: int) -> list[Tensor]:
    """q, k and v, (1, context, 4, 64)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, context, 4, 64, generator=generator).requires_grad_() for _ in range(3)]


if __name__ == "__main__":
    settings = allocator()
    if settings.items() <= os.environ.items():  # as training workers have them
        sys.exit(main())
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
