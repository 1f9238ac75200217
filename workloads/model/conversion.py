"""An exact model with another kind of attention: its weights in the new model, and what its layers' attention makes.

Dimensions: L layers, B batch, T context, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from escala.contract.errors import CheckpointError
from escala.schema import ModelConfig
from workloads.model.transformer import Transformer


class ConvertedTransformer(Transformer):
    """A model whose layers' attention can be asked for alone, given the inputs that an exact model's had."""

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        at_BT: Tensor | None = None,
        inputs_LBTD: Tensor | None = None,
    ) -> Tensor:
        """As Transformer's; with `inputs_LBTD`, (L, B, T, D): each layer's attention of its part of them."""
        if inputs_LBTD is None:
            return super().forward(tokens_BT, positions_BT, documents_BT, at_BT)
        context = tokens_BT.shape[1]
        rotation = self._rotary(context if positions_BT is None else positions_BT, like=inputs_LBTD)
        prepared = self.layers[0].attention.core.prepare(context, documents_BT, inputs_LBTD.device)
        recompute = self.activation_checkpointing and is_grad_enabled()
        outputs = []
        for block, x_BTD in zip(self.layers, inputs_LBTD, strict=True):
            arguments = (x_BTD, rotation, prepared)
            attention = block.attention
            outputs.append(
                checkpoint(attention, *arguments, use_reentrant=False) if recompute else attention(*arguments)
            )
        return torch.stack(outputs)


def converted(exact: Transformer, config: ModelConfig) -> ConvertedTransformer:
    """`exact` as the model of `config`, which differs in its attention. Weights that the exact model lacks
    (temperatures, gains, learned rows) are as the kind draws them; attention's are copies, all others are shared.

    Raises CheckpointError where the models differ in more.
    """
    model = ConvertedTransformer(config)
    own = {name for name in model.state_dict() if ".attention." in name}
    weights = {name: w.clone() if name in own else w for name, w in exact.state_dict().items()}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the start is not the converted model's: {error}") from error
    odd = [*unexpected, *(name for name in missing if ".attention.core." not in name)]
    if odd:
        raise CheckpointError(f"the start and the converted model differ in their tensors: {odd[:4]}")
    return model


def train_attention_alone(model: Transformer) -> None:
    """Freeze all but the layers' attention."""
    model.requires_grad_(False)
    for block in model.layers:
        block.attention.requires_grad_(True)


@torch.no_grad()
def attention_states(exact: Transformer, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What each layer's attention of a model reads and makes of it, (inputs_LBTD, outputs_LBTD)."""
    with _recorded([block.attention for block in exact.layers]) as found:
        exact.hidden(tokens_BT)
    inputs, outputs = zip(*found, strict=True)
    return torch.stack(inputs), torch.stack(outputs)


@contextmanager
def _recorded(modules: list[Any]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(first argument, result) of each call of the modules within the context."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], result: Tensor) -> None:
        calls.append((arguments[0], result))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(record).remove)
        yield calls
