"""The device that a rank trains on: threads, determinism, seeds, and what FLOP/s all ranks reach together."""

from __future__ import annotations

import torch
import torch.distributed
import torch.utils.deterministic

from escala.schema import ResourcesConfig, TrainingConfig
from workloads.training import meter


def device_of(resources: ResourcesConfig) -> torch.device:
    """What a rank trains on."""
    return torch.device("cuda" if resources.gpus_per_worker else "cpu")


def process_group_backend(on_gpu: bool) -> str:
    """What the ranks talk through. On GPUs, too, gloo for tensors on the CPU, which NCCL refuses: PPO's columns,
    and what all ranks agree on.
    """
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def set_up_torch(resources: ResourcesConfig) -> None:
    """Set threads, and on CPUs determinism: there the same seed and world size give the same bits. On GPUs the order
    of sums is the kernels' own (SDPA's backward pass, embedding's), and the last bits of a loss may differ.
    """
    torch.set_num_threads(resources.threads_per_worker)  # oversubscribed OpenMP costs up to 10x
    if resources.gpus_per_worker:
        return
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs a pass over memory. torch sets the module's class, which mypy does not see.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_step(seed: int, device: torch.device) -> None:
    """Seed what a step draws from. Not torch.manual_seed: for every kind of device that is not there it keeps the
    call, with its traceback, until one is: 2 ms a step, and memory without end.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def measure_peak(training: TrainingConfig, device: torch.device) -> float:
    """Choose the matmul precision; FLOP/s of the best matmuls of all ranks together. A collective call."""
    choice = meter.choose_matmul_precision(training.matmul_precision, device)
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    peak = torch.tensor(meter.peak_flops(dtype, device), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(peak)
    if torch.distributed.get_rank() == 0:
        print(choice, flush=True)
        ranks = torch.distributed.get_world_size()
        print(f"matmul peak of {ranks} workers together: {float(peak) / 1e9:.1f} GFLOP/s", flush=True)
    return float(peak)
