"""What a model's far part is worth: its held-out loss without it (docs/theory A.10).

A hybrid can learn to ignore its far part unnoticed (arXiv:2510.05901), so every evaluation of a model that has one runs
again with the far part left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from escala.schema import ModelConfig
from workloads.model.attention.hybrid import NearAndFar
from workloads.training.task import Evaluation

FAR_PART_TAG = "escala.event.far_part"
WORTH = "far_part_worth_nats"
LEAST_WORTH_NATS = 1e-3
"""Up to here a far part counts as worth nothing. A choice: 0.1 % of perplexity."""


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Leave the far part of every layer out within the context."""
    layers = [module for module in model.modules() if isinstance(module, NearAndFar)]
    for layer in layers:
        layer.is_far_bypassed = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_far_bypassed = False


def with_far_part(
    found: Evaluation,
    model: nn.Module,
    config: ModelConfig,
    context_tokens: int,
    again: Callable[[], Evaluation],
) -> Evaluation:
    """The evaluation with `far_part_worth_nats` (held-out loss without the far part less that with it) among its
    measures, and a notice where that is at most LEAST_WORTH_NATS; as it is for a model without a far part. A context
    that a window covers has none: that is said, and no measure is made up.

    Args:
        again: makes the same evaluation; a collective call.
    """
    if not config.attention.has_far_part:
        return found
    window = config.window_tokens or context_tokens
    if context_tokens <= window:
        said = f"there is none at a context of {context_tokens} tokens: window_tokens is {window}"
        return replace(found, notices={**found.notices, FAR_PART_TAG: f"far part: {said}"})
    with bypassed(model):
        worth = again().loss_nats - found.loss_nats
    notices = dict(found.notices)
    if worth <= LEAST_WORTH_NATS:
        notices[FAR_PART_TAG] = (
            f"far part: worth nothing ({worth:.5f} nats, bound {LEAST_WORTH_NATS:g}); "
            "attention window of equal window_tokens does as well for less"
        )
    return replace(found, measures={**found.measures, WORTH: worth}, notices=notices)
