"""What a rank's collectives move, counted where DeepSpeed calls them: the measure of docs/theory D.7's volumes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import deepspeed.comm.comm
import torch.distributed
from torch import Tensor

COLLECTIVES = {  # argument that is the whole tensor, its position, passes over (P - 1)/P of it
    "all_gather_into_tensor": ("output_tensor", 0, 1.0),
    "all_gather": ("tensor_list", 0, 1.0),
    "all_gather_coalesced": ("output_tensors", 0, 1.0),
    "reduce_scatter_tensor": ("input_tensor", 1, 1.0),
    "reduce_scatter": ("input_list", 1, 1.0),
    "all_reduce": ("tensor", 0, 2.0),
    "broadcast": ("tensor", 0, 1.0),
    "reduce": ("tensor", 0, 1.0),
}


class Traffic:
    """Bytes that this rank has sent in DeepSpeed's collectives, and how many those were, since it was made.

    A collective of P ranks over b bytes sends (P - 1)/P b from each rank, an all-reduce twice that (ring algorithms:
    Patarasuk & Yuan 2009). Raises RuntimeError before DeepSpeed has its communication backend.
    """

    def __init__(self) -> None:
        self.sent_bytes, self.calls = 0.0, 0
        backend: Any = deepspeed.comm.comm.cdb
        if backend is None:
            raise RuntimeError("deepspeed.init_distributed comes first")
        for name, (argument, position, passes) in COLLECTIVES.items():
            method = getattr(backend, name)
            uncounted = getattr(method, "uncounted", method)  # of an earlier run in this process
            setattr(backend, name, self._counted(uncounted, argument, position, passes))

    def _counted(self, method: Callable[..., Any], argument: str, position: int, passes: float) -> Any:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            whole = kwargs[argument] if argument in kwargs else args[position]
            ranks = torch.distributed.get_world_size(kwargs.get("group"))
            self.sent_bytes += passes * (ranks - 1) / ranks * _bytes(whole)
            self.calls += ranks > 1
            return method(*args, **kwargs)

        counted: Any = call
        counted.uncounted = method
        return counted


def _bytes(whole: Tensor | list[Tensor]) -> int:
    tensors = whole if isinstance(whole, list) else [whole]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
