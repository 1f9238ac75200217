"""An exact model with another kind of attention: its weights in the new model, and what its layers' attention makes.

Dimensions: L layers, B batch, T context, D model width; H query heads, G key/value heads, E = H / G, N = B * G, S head
size, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from escala.contract.errors import CheckpointError
from escala.schema import ModelConfig
from workloads.model.attention.hybrid import NearAndFar
from workloads.model.attention.layout import split_heads
from workloads.model.transformer import Transformer

FITTED_QUERIES = 64  # of a head at most, whose far weight its gain is fitted to


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
        shared = self.shared(tokens_BT.shape[1], positions_BT, documents_BT, inputs_LBTD)
        pairs = zip(self.layers, inputs_LBTD, strict=True)
        return torch.stack([self.apply_layer(block.attention, x_BTD, *shared) for block, x_BTD in pairs])


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
    inputs, outputs = zip(*((arguments[0], result) for arguments, result in found), strict=True)
    return torch.stack(inputs), torch.stack(outputs)


@torch.no_grad()
def fit_gains(model: ConvertedTransformer, exact: Transformer, tokens_BT: Tensor) -> None:
    """Set each head's gain so that the far part weighs what exact attention gives the far keys: the mean of
    log sum_Far e^(q.k / sqrt(S)) - log D over queries (docs/theory A.7, A.10). Nothing where there is no far part. At a
    gain of 0 a map at unit norm may give far keys, of which there are many, nearly all weight.
    """
    cores = [core for block in model.layers if isinstance(core := block.attention.core, NearAndFar)]
    if not cores or tokens_BT.shape[1] <= 2 * cores[0].block_tokens:
        return
    inputs_LBTD, _ = attention_states(exact, tokens_BT)
    with _recorded(cores) as found:
        model(tokens_BT, inputs_LBTD=inputs_LBTD)
    for core, (arguments, _) in zip(cores, found, strict=True):
        core.gain_H.copy_(_matched_gain(core, *arguments))


def _matched_gain(core: NearAndFar, q_BTHS: Tensor, k_BTGS: Tensor, v_BTGS: Tensor) -> Tensor:
    """gain_H, from FITTED_QUERIES queries spread over those that have far keys: time linear in T."""
    batch, context, block = len(q_BTHS), q_BTHS.shape[1], core.block_tokens
    q_NETS, k_NTS, v_NTS = split_heads(q_BTHS, k_BTGS, v_BTGS)
    band = core.prepare(context, None, q_BTHS.device)
    x_NETS, y_NTS, temperature_N = core.unit(q_NETS, k_NTS)
    _, denominator_NET, log_scale_N = core.far(x_NETS, y_NTS, v_NTS, temperature_N, band)
    stride = -(-(context - 2 * block) // FITTED_QUERIES)
    picked_Q = torch.arange(2 * block, context, stride)
    scores_NEQT = torch.einsum("neqs,nts->neqt", q_NETS[:, :, picked_Q], k_NTS) * q_NETS.shape[-1] ** -0.5
    is_near_QT = torch.arange(context) // block > picked_Q[:, None] // block - 2
    exact_NEQ = scores_NEQT.masked_fill(is_near_QT, float("-inf")).logsumexp(-1)
    own_NEQ = denominator_NET[:, :, picked_Q].log()
    if log_scale_N is not None:
        own_NEQ = own_NEQ + log_scale_N.view(-1, 1, 1)
    gain_H: Tensor = (exact_NEQ - own_NEQ).mean(-1).view(batch, -1).mean(0)
    return gain_H


@contextmanager
def _recorded(modules: list[Any]) -> Iterator[list[tuple[tuple[Any, ...], Tensor]]]:
    """(arguments by position, result) of each call of the modules within the context."""
    calls: list[tuple[tuple[Any, ...], Tensor]] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], result: Tensor) -> None:
        calls.append((arguments, result))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(record).remove)
        yield calls
