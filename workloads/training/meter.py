"""How fast, how full: the device's measured peak, which matmul precision keeps fp32 error, throughput,
memory.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import torch
import torch.distributed
from torch import Tensor

# Side of the square matrices, and products in a row before the clock is read. On a GPU one of 2 GFLOP would take less
# time (3 us) than to launch it and to wait for it.
CPU_PEAK, GPU_PEAK = (1024, 1), (4096, 16)
PEAK_SECONDS = 0.5
TRAINING_SHAPE = (2048, 512, 1408)  # rows = tokens of a micro-batch, d_model, d_ff
MOST_ERROR, LEAST_GAIN = 2.0, 1.4  # of 'medium' over 'highest', see choose_matmul_precision


@dataclass(frozen=True)
class MatmulChoice:
    """What the start-up check found. Errors: largest, relative to the result's root mean square."""

    precision: str  # "medium" or "highest"
    highest_error: float
    medium_error: float
    highest_flops_per_second: float
    medium_flops_per_second: float

    def __str__(self) -> str:
        gain = self.medium_flops_per_second / self.highest_flops_per_second
        return (
            f"matmul precision {self.precision}: 'medium' {self.medium_flops_per_second / 1e9:.1f} GFLOP/s "
            f"against {self.highest_flops_per_second / 1e9:.1f} ({gain:.2f}x), largest relative error "
            f"{self.medium_error:.1e} against {self.highest_error:.1e}"
        )


def choose_matmul_precision(setting: str, device: torch.device) -> MatmulChoice:
    """Choose between 'medium' and 'highest', once a process, and set what is to be used.

    'medium' is chosen where its largest error is at most MOST_ERROR times that of 'highest' and its speed at least
    LEAST_GAIN times. Both gains that have been seen are far from that, 2 (a CPU on which MKL does without AVX-512) and
    0.5 to 1 (one on which it does not; there 'medium' also keeps memory for each shape), so that every attempt of a run
    decides alike. Raises RuntimeError without a process group.
    """
    choice = _compare_matmul_precisions(setting, device)
    torch.set_float32_matmul_precision(choice.precision)
    return choice


@cache
def _compare_matmul_precisions(setting: str, device: torch.device) -> MatmulChoice:
    """Measure 'medium' against 'highest' on fp32 matrices of a training's shape, in turns. All ranks take the more
    careful choice of any of them.
    """
    rows, inner, columns = TRAINING_SHAPE
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator).to(device)
    b = torch.randn(inner, columns, generator=generator).to(device)
    exact = a.double() @ b.double()
    errors, speeds = {}, {"highest": 0.0, "medium": 0.0}
    for precision in speeds:
        torch.set_float32_matmul_precision(precision)
        errors[precision] = float((a @ b - exact).abs().max() / exact.square().mean().sqrt())
    for precision in (*speeds,) * 4:
        torch.set_float32_matmul_precision(precision)
        speeds[precision] = max(speeds[precision], _best_speed(a, b, repeats=2))
    is_better = setting == "auto" and prefer_medium(errors, speeds)
    keep = torch.tensor(float(is_better), device=device)
    torch.distributed.all_reduce(keep, op=torch.distributed.ReduceOp.MIN)
    chosen = "medium" if keep.item() else "highest"
    return MatmulChoice(chosen, errors["highest"], errors["medium"], speeds["highest"], speeds["medium"])


def prefer_medium(errors: dict[str, float], speeds: dict[str, float]) -> bool:
    """Whether 'medium' is as exact as it must be and worth it."""
    exact = errors["medium"] <= MOST_ERROR * errors["highest"]
    return exact and speeds["medium"] >= LEAST_GAIN * speeds["highest"]


def peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of this rank's best square matmul in half a second, at the threads and precision now set.

    This is what MFU is relative to: the device under the load at the process's first model, not a data sheet.
    """
    return _measure_peak(dtype, device, torch.get_num_threads(), torch.get_float32_matmul_precision())


@cache
def _measure_peak(dtype: torch.dtype, device: torch.device, threads: int, precision: str) -> float:
    generator = torch.Generator().manual_seed(0)
    side, in_a_row = CPU_PEAK if device.type == "cpu" else GPU_PEAK
    a = torch.randn(side, side, generator=generator).to(device, dtype)
    best, until = 0.0, time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < until:
        best = max(best, _best_speed(a, a, repeats=3, in_a_row=in_a_row))
    return best


def give_back_memory() -> None:
    """What has been freed goes back to the system: glibc keeps it in a process that trains (`driver.allocator`)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc has it
        trim(0)


def reset_peak_memory(device: torch.device) -> None:
    """Begin to count the peak again: a process may train one model after another."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    except OSError as error:  # a hardened container
        print(f"peak memory counts from this process's start: {error}", flush=True)


def peak_memory_bytes(device: torch.device) -> int:
    """This process's largest resident set since `reset_peak_memory`; on CUDA the device's largest allocation."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def memory_bytes(device: torch.device) -> int:
    """This process's resident set now; on CUDA what is allocated on the device."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else _status("VmRSS")


def _status(name: str) -> int:
    """A size in bytes from proc(5)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


class Throughput:
    """Tokens per second of optimiser steps alone: evaluations and checkpoints stand outside its laps."""

    def __init__(self) -> None:
        self._first = self._started = time.perf_counter()
        self._last: float | None = None
        self._laps: list[float] = []
        self.tokens = 0

    def begin_step(self) -> None:
        """Start the clock of one step."""
        self._started = time.perf_counter()

    def end_step(self, tokens: int) -> None:
        """Stop it; the step trained on `tokens`."""
        lap = time.perf_counter() - self._started
        self.tokens += tokens
        self._laps.append(lap)
        rate = tokens / lap
        self._last = rate if self._last is None else 0.9 * self._last + 0.1 * rate

    @property
    def recent(self) -> float | None:
        """Tokens per second, the last ten steps or so weighing most."""
        return self._last

    @property
    def overall(self) -> float | None:
        """Tokens per second over all steps of this attempt."""
        return self.tokens / sum(self._laps) if self._laps else None

    @property
    def step_seconds(self) -> float | None:
        """The median step's: the first ones, slower, do not count."""
        return median(self._laps) if self._laps else None

    @property
    def wall_seconds(self) -> float:
        """Since this object was made: steps, evaluations and checkpoints together."""
        return time.perf_counter() - self._first


def _best_speed(a: Tensor, b: Tensor, repeats: int, in_a_row: int = 1) -> float:
    flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[1] * in_a_row
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(in_a_row):
            product = a @ b
        product.flatten()[0].item()  # item() waits for a GPU
        best = min(best, time.perf_counter() - start)
    return flops / best
