"""Weights scaled by their inputs before they are rounded (AWQ: Lin et al. 2023; docs/theory E.6).

An input channel that is large makes its weights' errors count more. Such a channel's weights are multiplied by s > 1,
and what stands before divides by it: the function stays, and the channel's share of a group's rounding error shrinks.
s = (mean |x|)^alpha of each channel, alpha in [0, 1] chosen by the output error on the calibration tokens.

Dimensions: B batch, T context, N = B T tokens, I inputs of a matrix, M outputs of all matrices that read the same
inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from escala.contract.errors import DataError
from escala.schema.compression import MatrixChoice, StoredWeights
from workloads.model.compression.quantize import quantize
from workloads.model.layers import FeedForward
from workloads.model.moe import MixtureOfExperts
from workloads.model.transformer import Block, Transformer

if TYPE_CHECKING:  # needs tokenizers, and an engine on a GPU torch alone
    from workloads.data.chat import ChatTokenizer

ALPHAS = [step / 20 for step in range(21)]
"""Lin et al. search 20 values as well. 0 scales nothing: the choice is never worse than none, on these tokens."""
CALIBRATION_TOKENS = 16_384
"""Of a calibration text, at most: the second moments of 512 to 1,536 channels are known well by then."""


def calibration_tokens(path: Path, tokenizer: ChatTokenizer, context_tokens: int) -> Tensor:
    """tokens_BT of the beginning of a text file, in whole rows of at most `context_tokens`.

    Raises DataError where it cannot be read, or has no two tokens.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"quantization.calibration {path} can't be read: {error}.", "Give a text file in UTF-8."
        ) from error
    ids = tokenizer.encode(text[: 16 * CALIBRATION_TOKENS])[:CALIBRATION_TOKENS]
    if len(ids) < 2:
        raise DataError(
            f"quantization.calibration {path} holds {len(ids)} tokens.", "Give some pages of text."
        )
    width = min(context_tokens, len(ids))
    rows = len(ids) // width
    return torch.tensor(ids[: rows * width]).view(rows, width)


def calibration_of(stored: StoredWeights, tokenizer: ChatTokenizer, context_tokens: int) -> Tensor | None:
    """`calibration_tokens` of the text that `stored` names; None where it names none."""
    named = stored.quantization.calibration
    return None if named is None else calibration_tokens(Path(named), tokenizer, context_tokens)


@torch.no_grad()
def scale_by_activations(model: Transformer, tokens_BT: Tensor, choice: MatrixChoice) -> None:
    """Scale the input channels of the matrices of `model`, in place, so that codes of `choice` lose least on
    `tokens_BT`; what the model computes stays, but for fp32's rounding. What stands before a matrix takes the inverse:

        attention_norm -> query, key, value     feed_forward_norm -> gate, up; a mixture's router and experts
        value -> output (heads that share a value channel: the largest of theirs)     up -> down, not in experts

    The candidates are compared by their nearest codes, whatever the method of `choice`: half-quadratic ones take 20
    times as long.
    """
    nearest = choice.model_copy(update={"method": "round"})
    x_BTD = model.embedding(tokens_BT)
    shared = model.shared(tokens_BT.shape[1], None, None, x_BTD)
    for block in model.layers:
        with _watched(block) as seen:
            x_BTD = block(x_BTD, *shared)
        _scale_attention(block, seen, nearest)
        _scale_feed_forward(block, seen, nearest)


@dataclass
class _Moments:
    """Of the inputs of a module: their mean sizes, and the sums of their products."""

    size_I: Tensor
    gram_II: Tensor


@contextmanager
def _watched(block: Block) -> Iterator[dict[nn.Module, _Moments]]:
    """Module of the block -> what it read, filled in by forward passes inside."""
    seen: dict[nn.Module, _Moments] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_NI = inputs[0].flatten(0, -2).float()
        seen[module] = _Moments(x_NI.abs().mean(0), x_NI.t() @ x_NI)

    watched = [block.attention.query, block.attention.output, block.feed_forward]
    watched += [part.down for part in block.modules() if isinstance(part, FeedForward)]
    handles = [module.register_forward_pre_hook(note) for module in watched]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _scale_attention(block: Block, seen: Mapping[nn.Module, _Moments], choice: MatrixChoice) -> None:
    attention = block.attention
    projections = [matrix.weight for matrix in (attention.query, attention.key, attention.value)]
    scale_I = _best_scale(torch.cat(projections), seen[attention.query], choice)
    _fold(scale_I, block.attention_norm.weight, projections)

    groups = (attention.kv_heads, attention.heads // attention.kv_heads, attention.size)

    def shared(size_I: Tensor) -> Tensor:
        """The largest of the query heads that read a value channel, for each of them."""
        return size_I.view(groups).amax(1, keepdim=True).expand(groups).flatten()

    moments = seen[attention.output]
    moments = _Moments(shared(moments.size_I), moments.gram_II)
    scale_I = _best_scale(attention.output.weight, moments, choice)
    _fold(scale_I.view(groups)[:, 0].flatten()[:, None], attention.value.weight, [])
    attention.output.weight.mul_(scale_I)


def _scale_feed_forward(block: Block, seen: Mapping[nn.Module, _Moments], choice: MatrixChoice) -> None:
    plain = [part for part in block.feed_forward.modules() if isinstance(part, FeedForward)]
    coded = [matrix.weight for part in plain for matrix in (part.gate, part.up)]
    readers = list(coded)
    if isinstance(block.feed_forward, MixtureOfExperts):
        coded += [block.feed_forward.experts.gate, block.feed_forward.experts.up]
        readers = [*coded, block.feed_forward.router.weight]
    rows_MI = torch.cat([weight.flatten(0, -2) for weight in coded])
    scale_I = _best_scale(rows_MI, seen[block.feed_forward], choice)
    _fold(scale_I, block.feed_forward_norm.weight, readers)
    for part in plain:
        scale_I = _best_scale(part.down.weight, seen[part.down], choice)
        _fold(scale_I[:, None], part.up.weight, [])
        part.down.weight.mul_(scale_I)


def _fold(scale: Tensor, before: Tensor, readers: Sequence[Tensor]) -> None:
    """Divide what stands before by the scale, and multiply the input channels of its readers."""
    before.div_(scale)
    for weight in readers:
        weight.mul_(scale)


def _best_scale(weight_MI: Tensor, moments: _Moments, choice: MatrixChoice) -> Tensor:
    """The scale_I whose codes change the outputs least, in squares over the calibration tokens; its largest and
    smallest are each other's inverses.
    """
    least, best_I = math.inf, torch.ones_like(moments.size_I)
    size_I = moments.size_I.clamp(min=1e-8)  # a channel that is always 0
    for alpha in ALPHAS:
        scale_I = size_I.pow(alpha)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        stored_MI = quantize(weight_MI * scale_I, choice.bits, choice.group, choice.method).dequantize()
        error_MI = stored_MI.div_(scale_I).sub_(weight_MI)
        error = float((error_MI @ moments.gram_II).mul_(error_MI).sum())
        if error < least:
            least, best_I = error, scale_I
    return best_I
