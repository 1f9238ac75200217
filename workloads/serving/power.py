"""Power or frequency of a replica's device, where this machine lets us set it (docs/theory E.7).

A GPU's power limit or clocks (NVML, through zeus), a CPU's frequency (cpufreq), or else its sockets' limit (RAPL).
A CPU's holds for all that runs on it. What was there before is put back when the replica leaves; one that is killed
leaves it as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from workloads.serving.energy import zeus_call, zeus_gpus

SYS = Path("/sys")


class PowerActuator(Protocol):
    """Sets a share of full power or frequency."""

    name: str

    def set(self, share: float) -> None:
        """To `share` of the most, above 0, at most 1. Raises OSError where the machine refuses."""
        ...

    def restore(self) -> None:
        """As it was. Raises OSError."""
        ...


class GpuPower:
    """NVML's power limit of this replica's GPU. Not tested on a GPU. Raises OSError where it cannot be set."""

    name = "NVML power limit"

    def __init__(self) -> None:
        import torch

        self._index = torch.cuda.current_device()
        self._gpus = zeus_gpus()
        self._least, self._most = zeus_call(self._gpus.get_power_management_limit_constraints, self._index)
        self._before = zeus_call(self._gpus.get_power_management_limit, self._index)
        self._write(self._before)

    def set(self, share: float) -> None:
        """See PowerActuator."""
        self._write(max(self._least, round(share * self._most)))

    def restore(self) -> None:
        """See PowerActuator."""
        self._write(self._before)

    def _write(self, milliwatts: int) -> None:
        zeus_call(self._gpus.set_power_management_limit, self._index, milliwatts)


class GpuClocks:
    """NVML's clocks of this replica's GPU, for where its power limit cannot be set. Not tested on a GPU. Raises OSError
    where they cannot be either.
    """

    name = "NVML clocks"

    def __init__(self) -> None:
        import torch

        self._index = torch.cuda.current_device()
        self._gpus = zeus_gpus()
        clocks = zeus_call(self._gpus.get_supported_graphics_clocks, self._index)
        self._least, self._most = min(clocks), max(clocks)
        self.restore()

    def set(self, share: float) -> None:
        """See PowerActuator."""
        most = max(self._least, round(share * self._most))
        zeus_call(self._gpus.set_gpu_locked_clocks, self._index, self._least, most)

    def restore(self) -> None:
        """See PowerActuator."""
        zeus_call(self._gpus.reset_gpu_locked_clocks, self._index)


class FileLimits:
    """Numbers in the kernel's files, each with the most that it may be.

    Raises OSError where there are none, or they may not be written.
    """

    def __init__(self, name: str, files: Iterable[tuple[Path, Path]]) -> None:
        self.name = name
        self._most = {path: int(most.read_text()) for path, most in files}
        if not self._most:
            raise FileNotFoundError(f"no {name} here")
        self._before = {path: int(path.read_text()) for path in self._most}
        self.restore()

    def set(self, share: float) -> None:
        """See PowerActuator."""
        for path, most in self._most.items():
            path.write_text(str(round(share * most)))

    def restore(self) -> None:
        """See PowerActuator."""
        for path, before in self._before.items():
            path.write_text(str(before))


def cpu_frequency(root: Path = SYS) -> FileLimits:
    """cpufreq of the CPUs that this process may use. Raises OSError."""
    at = root / "devices/system/cpu"
    found = [at / f"cpu{number}/cpufreq" for number in sorted(os.sched_getaffinity(0))]
    files = [(path / "scaling_max_freq", path / "cpuinfo_max_freq") for path in found if path.is_dir()]
    return FileLimits("cpufreq", files)


def socket_power(root: Path = SYS) -> FileLimits:
    """RAPL's long-term power limit of the sockets. Raises OSError."""
    zones = sorted(p for p in (root / "class/powercap").glob("intel-rapl:*") if p.name.count(":") == 1)
    files = [(zone / "constraint_0_power_limit_uw", zone / "constraint_0_max_power_uw") for zone in zones]
    return FileLimits("RAPL power limit", files)


def find_actuator(on_gpu: bool, root: Path = SYS) -> tuple[PowerActuator | None, str]:
    """The first that can be set, and what is available or why nothing is, in words."""
    reasons = []
    for make in (
        (GpuPower, GpuClocks) if on_gpu else (lambda: cpu_frequency(root), lambda: socket_power(root))
    ):
        try:
            found: PowerActuator = make()
        except (OSError, ValueError) as error:
            reasons.append(str(error))
        else:
            return found, found.name
    return None, "not available: " + "; ".join(reasons)
