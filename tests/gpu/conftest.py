"""Tests on one CUDA device: `make test-gpu`. They need torch, pydantic and pytest, nothing else; hence a conftest of
their own (`--confcutdir`).

GPU_TESTS_DEVICE=cpu runs the same bodies on the CPU, small, to try the tests themselves. Figures are printed at the
end, and written into the directory $OUT where it is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.figures import Figures
from workloads.training.device import process_group_backend

KEY = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    """The figures of this session; the marker, where pyproject.toml is not read."""
    config.stash[KEY] = Figures()
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the figures."""
    figures = config.stash[KEY]
    if figures.rows:
        terminalreporter.write_sep("=", "figures")
        terminalreporter.write_line(figures.table())
        if os.environ.get("OUT"):
            figures.write(Path(os.environ["OUT"]))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """What is tested; skips where there is no CUDA device."""
    name = os.environ.get("GPU_TESTS_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    torch.set_num_threads(max(1, min(8, os.cpu_count() or 1)) if name == "cuda" else 1)
    return torch.device(name)


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config, device: torch.device) -> Figures:
    """Where a test puts what it has measured."""
    found = pytestconfig.stash[KEY]
    found.device = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, a rehearsal"
    return found


@pytest.fixture(scope="session")
def alone(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, as a training worker has one."""
    store = torch.distributed.HashStore()
    backend = process_group_backend(device.type == "cuda")
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _memory_back(device: torch.device) -> Iterator[None]:
    """What a test held is the device's again."""
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()
