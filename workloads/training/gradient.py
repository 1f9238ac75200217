"""The gradient of an optimiser step: that of the mean loss over all units of the step, however ranks and micro-batches
cut it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed
from torch import Tensor

B = TypeVar("B")


def accumulate(
    engine: Any,
    micro_batches: Iterable[B],
    micro_steps: int,
    step_units: float,
    loss: Callable[[Any, B], Tensor],
    auxiliary: Callable[[], Tensor | float] | None = None,
) -> Tensor:
    """Forward and backward over this rank's micro-batches; the caller then calls `zero.optimizer_step`.

    Args:
        micro_batches: `micro_steps` of them, on the engine's device.
        step_units: units of the step over all ranks (tokens, pairs): what the summed loss is divided by.
        loss: the sum of a micro-batch's losses, given the engine and the micro-batch.
        auxiliary: losses of the forward pass just made, to be added to the mean loss (`experts.Routers.loss`).

    Returns:
        The sum of this rank's losses, a scalar tensor.
    """
    scale = torch.distributed.get_world_size() / step_units  # DeepSpeed averages over the ranks
    losses = []
    for micro, batch in enumerate(micro_batches):
        if micro:
            engine.step()  # counts the micro-batch before; updates nothing until the last one
        total = loss(engine, batch)
        added = auxiliary() / micro_steps if auxiliary else 0.0
        engine.backward(total * scale + added, scale_wrt_gas=False)
        losses.append(total.detach())
    if len(losses) != micro_steps:
        raise ValueError(f"{len(losses)} micro-batches, not {micro_steps}")
    return torch.stack(losses).sum()
