"""Engines by the kind of their section: module `workloads.generation.engines.KIND` makes one.

What the control plane must know of a kind (its limits) stands in `escala.schema.engines.KIND`.
"""

from __future__ import annotations

import importlib

from escala.schema.engines import EngineKind
from workloads.generation.protocol import EngineProtocol, EngineTokenizer
from workloads.model.transformer import Transformer


def make_engine(section: EngineKind, model: Transformer, tokenizer: EngineTokenizer | None) -> EngineProtocol:
    """`make_engine` of the kind's module: an engine for `model`, on its device and in its dtype.

    Raises SpecError where the section's limits cannot hold.
    """
    module = importlib.import_module(f"{__name__}.{section.kind}")
    engine: EngineProtocol = module.make_engine(section, model, tokenizer)
    return engine
