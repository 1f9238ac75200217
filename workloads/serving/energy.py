"""Joules of one replica: read from a counter where there is one, else estimated (docs/theory E.1).

A GPU has a counter of its own (NVML, through zeus). RAPL counts a node's sockets: a replica's part is its process's
share of the node's CPU time. A counter that may not be read is unknown, and the estimate says so; it is never taken for
zero.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil

from escala.contract.records import Rates
from escala.schema import ModelConfig
from escala.schema.flops import TRAINING_PER_FORWARD, flops_per_token
from workloads.generation.protocol import EngineStats

POWERCAP = Path("/sys/class/powercap")


class JouleCounter(Protocol):
    """A device's joules that this replica used, from its construction on."""

    def read(self) -> float:
        """So far. Raises OSError where it can't be read any more."""
        ...


class RaplShare:
    """This process's share, by CPU time, of what a node's sockets used. Read it once in a minute at least: counters
    begin again from 0 (after some 260 kJ), which is noticed once.

    Args:
        root: where the kernel shows powercap zones.

    Raises OSError where there is no counter, or it may not be read.
    """

    def __init__(self, root: Path = POWERCAP, busy: Callable[[], tuple[float, float]] | None = None) -> None:
        self._zones = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
        if not self._zones:
            raise FileNotFoundError(f"no RAPL counter in {root}")
        self._busy = busy or _cpu_seconds
        self._joules = 0.0
        self._last = self._sample()

    def read(self) -> float:
        """See JouleCounter."""
        now = self._sample()
        (counted, mine, all_), (before, mine_before, all_before) = now, self._last
        used = sum(_passed(a, b, zone) for a, b, zone in zip(counted, before, self._zones, strict=True))
        share = min(max((mine - mine_before) / (all_ - all_before), 0.0), 1.0) if all_ > all_before else 0.0
        self._joules += used / 1e6 * share
        self._last = now
        return self._joules

    def _sample(self) -> tuple[list[int], float, float]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones], *self._busy()


def _passed(now: int, before: int, zone: Path) -> int:
    """Microjoules since, across the counter's end."""
    return now - before if now >= before else now - before + int((zone / "max_energy_range_uj").read_text())


def _cpu_seconds() -> tuple[float, float]:
    """Of this process, and of all the node's."""
    mine, node = psutil.Process().cpu_times(), psutil.cpu_times()
    return mine.user + mine.system, sum(node) - node.idle - getattr(node, "iowait", 0.0)


class GpuCounter:
    """NVML's counter of this replica's GPU. Not tested on a machine with one.

    Raises OSError without zeus (the extra `energy`), or where the GPU has no counter.
    """

    def __init__(self) -> None:
        import torch

        self._index = torch.cuda.current_device()
        self._gpus = zeus_gpus()
        if not zeus_call(self._gpus.supports_get_total_energy_consumption, self._index):
            raise OSError("this GPU has no counter of energy")
        self._begun = self._millijoules()

    def read(self) -> float:
        """See JouleCounter."""
        return (self._millijoules() - self._begun) / 1e3

    def _millijoules(self) -> float:
        return float(zeus_call(self._gpus.get_total_energy_consumption, self._index))


def zeus_gpus() -> Any:
    """zeus' GPUs. Raises OSError without zeus, or where it finds none."""
    if importlib.util.find_spec("zeus") is None:
        raise OSError("zeus is not installed (the extra `energy`)")
    gpu: Any = importlib.import_module("zeus.device.gpu")
    return zeus_call(gpu.get_gpus)


def zeus_call(method: Callable[..., Any], *arguments: Any) -> Any:
    """What a method of zeus' answers. Raises OSError where it refuses."""
    errors: Any = importlib.import_module("zeus.device.exception")
    try:
        return method(*arguments)
    except errors.ZeusBaseGPUError as error:
        raise OSError(f"zeus: {error}") from error


class ReplicaEnergy:
    """Joules at the meter since this replica started.

    Args:
        rates: of the cluster's file; None: no estimate, and no site's factor.
        model: that is served.
        make_counter: of this replica's device.

    Attributes:
        counted: whether a counter is read.
        source: what the joules are from, or why there are none, in words.
    """

    def __init__(
        self, rates: Rates | None, model: ModelConfig, make_counter: Callable[[], JouleCounter]
    ) -> None:
        self._rates = rates
        flops = flops_per_token(model, model.max_context_tokens // 2 or 1)
        self._flops = flops.total / TRAINING_PER_FORWARD
        self._counter: JouleCounter | None = None
        self.source = "no coefficients of the device's energy in the cluster's file"
        try:
            self._counter = make_counter()
        except OSError as error:
            if rates is not None:
                self.source = f"estimate; no counter: {error}"
        else:
            self.source = "counter"

    @property
    def counted(self) -> bool:
        """Whether a counter is read."""
        return self._counter is not None

    def read(self, stats: EngineStats, alive_seconds: float) -> float | None:
        """So far; None where it is not known.

        The estimate takes all weights for read once a step, and a token's arithmetic at half of the context.
        """
        factor = 1.0 if self._rates is None else self._rates.site_factor
        if self._counter is not None:
            return factor * self._counter.read()
        if self._rates is None:
            return None
        tokens = stats.prompt_tokens + stats.generated_tokens
        return self._rates.joules(
            1, alive_seconds, tokens * self._flops, stats.steps * float(stats.weight_bytes)
        )


def counter_of(on_gpu: bool) -> JouleCounter:
    """This replica's counter. Raises OSError where there is none."""
    return GpuCounter() if on_gpu else RaplShare()
