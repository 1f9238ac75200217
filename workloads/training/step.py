"""One optimiser step: gradients of the mean loss over all tokens of the step, however ranks and micro-batches
cut it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed
from torch import Tensor

from workloads.training.loss import token_loss


def accumulate(
    engine: Any,
    micro_batches: Iterable[Tensor],
    micro_steps: int,
    step_tokens: int,
    auxiliary: Callable[[], Tensor | float] | None = None,
) -> Tensor:
    """Forward and backward over this rank's micro-batches; the caller then calls `zero.optimizer_step`.

    Args:
        micro_batches: `micro_steps` tensors tokens_BT1 of T + 1 token ids, on the engine's device.
        step_tokens: targets of the step over all ranks: what the summed loss is divided by.
        auxiliary: losses of the forward pass just made, to be added to the mean loss (`experts.Routers.loss`).

    Returns:
        The sum of this rank's losses in nats, a scalar tensor.
    """
    scale = torch.distributed.get_world_size() / step_tokens  # DeepSpeed averages over the ranks
    losses = []
    for micro, tokens_BT1 in enumerate(micro_batches):
        if micro:
            engine.step()  # counts the micro-batch before; updates nothing until the last one
        total, _ = token_loss(engine(tokens_BT1[:, :-1]), tokens_BT1[:, 1:])
        added = auxiliary() / micro_steps if auxiliary else 0.0
        engine.backward(total * scale + added, scale_wrt_gas=False)
        losses.append(total.detach())
    if len(losses) != micro_steps:
        raise ValueError(f"{len(losses)} micro-batches, not {micro_steps}")
    return torch.stack(losses).sum()
