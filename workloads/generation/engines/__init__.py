"""Engines by the kind of their section: module `workloads.generation.engines.KIND` makes one.

What the control plane must know of a kind (its limits) stands in `escala.schema.engines.KIND`.
"""

from __future__ import annotations

import importlib

from escala.schema.engines import EngineKind
from workloads.generation.network import Smaller
from workloads.generation.protocol import EngineProtocol, EngineTokenizer
from workloads.model.transformer import Transformer


def make_engine(
    section: EngineKind,
    model: Transformer,
    tokenizer: EngineTokenizer | None,
    kernels: str | None = None,
    smaller: Smaller | None = None,
    capacity_factor: float | None = None,
) -> EngineProtocol:
    """`make_engine` of the kind's module: an engine for `model`, on its device and in its dtype.

    Args:
        kernels: a choice as text, or MEASURED; None: the first that can, unmeasured.
        smaller: how matrices in full precision are stored; None: they stay.
        capacity_factor: of a mixture's experts in each request; None: the model's own.

    Raises SpecError where the section's limits cannot hold, the kernels or the factor can't be had, or the matrices not
    be stored so.
    """
    module = importlib.import_module(f"{__name__}.{section.kind}")
    engine: EngineProtocol = module.make_engine(section, model, tokenizer, kernels, smaller, capacity_factor)
    return engine
