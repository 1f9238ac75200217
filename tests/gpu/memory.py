"""The most memory that some work has on a device at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The peak of allocations during `work`, less what was allocated before. On CUDA the allocator's own count; on
    the CPU that of live tensors, without what a kernel takes for itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveTensors() as live:
        work()
    return live.peak


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that were made under it and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the storages of an operator's results that its arguments do not have."""
        old = {_storage(x) for x in tree_iter((args, kwargs)) if _has_storage(x)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if _has_storage(tensor) and _storage(tensor) not in old | self._known:
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _has_storage(x: object) -> bool:
    """Whether it is a tensor, and not one in oneDNN's own layout."""
    return isinstance(x, torch.Tensor) and x.layout == torch.strided


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
