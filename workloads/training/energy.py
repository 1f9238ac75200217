"""Joules of a run: read from counters where there are any, else estimated from the cluster's stated coefficients.

Counters: NVML (a rank's own GPU) and RAPL (the sockets and memory of a node, read by its first rank), through zeus
(You et al. 2023), where it is installed (`escala[energy]`). Not tested on a machine with counters.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from typing import Any

import torch
import torch.distributed

from escala.contract.records import AttemptSpec, Rates
from escala.schema import TrainedConfig
from escala.schema.flops import flops_per_token, moved_bytes_per_step, training_flops_per_token

RATES_TAG = "escala.rates"
ESTIMATE = "estimate from FLOPs, bytes and seconds, by the coefficients of the cluster's file"
RAPL = "/sys/class/powercap/intel-rapl"
WINDOW = "run"


def rates(spec: AttemptSpec) -> Rates | None:
    """What the control plane knows of the cluster's prices and coefficients; None for an attempt without them."""
    text = spec.tags.get(RATES_TAG)
    return None if text is None else Rates(**json.loads(text))


class EnergyMeter:
    """Of one rank, from now on. Collective: all ranks make one, and all read it."""

    def __init__(self, device: torch.device) -> None:
        self._monitor = _monitor(device)
        self._device = device
        if self._monitor is not None:
            self._monitor.begin_window(WINDOW)

    def read(self) -> float | None:
        """Joules of all ranks' devices since the start; None where a rank has no counter. Ends the reading."""
        joules = torch.full((1,), torch.nan, dtype=torch.float64, device=self._device)
        if self._monitor is not None:
            found = self._monitor.end_window(WINDOW)
            parts = [found.gpu_energy, found.cpu_energy or {}, found.dram_energy or {}]
            joules[0] = sum(sum(part.values()) for part in parts)
        torch.distributed.all_reduce(joules)
        return None if joules.isnan().item() else float(joules)


def _monitor(device: torch.device) -> Any:
    """zeus' monitor of this rank's GPU and, for a node's first rank, its sockets; None without zeus or counters."""
    if importlib.util.find_spec("zeus") is None:
        return None
    on_gpu, has_rapl = device.type == "cuda", os.path.isdir(RAPL)
    if not on_gpu and not has_rapl:
        return None
    zeus: Any = importlib.import_module("zeus.monitor")

    first = os.environ.get("LOCAL_RANK", "0") == "0"
    gpus = [torch.cuda.current_device()] if on_gpu else []
    return zeus.ZeusMonitor(gpu_indices=gpus, cpu_indices=None if first and has_rapl else [])


def account(
    spec: AttemptSpec, config: TrainedConfig, counted: float | None, tokens: int, seconds: float
) -> dict[str, Any]:
    """The record's energy, money and carbon of an attempt that trained on `tokens` over `seconds`; what is not known
    is left out.

    A counter sees the devices alone; the site's overhead (PUE) is added to it.
    """
    known = rates(spec)
    if known is None:
        return {} if counted is None else {"energy_joules": counted, "energy_source": "counter (zeus)"}
    workers = config.resources.workers
    if counted is not None:
        joules: float | None = counted * known.site_factor
        source = "counter (zeus: NVML, RAPL)"
    else:
        flops = flops_per_token(config.model, config.context_tokens)
        again = (flops.total - flops.logits) / 3 if config.training.activation_checkpointing else 0.0
        moved = moved_bytes_per_step(config) * tokens / config.step_tokens
        work = (training_flops_per_token(config) + again) * tokens
        joules = known.joules(workers, seconds, work, moved)
        source = ESTIMATE
    found = {
        "energy_joules": joules,
        "joules_per_token": joules / tokens if joules is not None and tokens else None,
        "energy_source": None if joules is None else source,
        "cost_usd": known.usd(workers, seconds),
        "carbon_gco2e": known.gco2e(joules),
    }
    return {name: value for name, value in found.items() if value is not None}
