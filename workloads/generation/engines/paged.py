"""Our own engine: continuous batching over a paged cache."""

from __future__ import annotations

from escala.schema.engines.paged import PagedEngineConfig
from workloads.generation.engine import Engine
from workloads.generation.network import Smaller
from workloads.generation.protocol import EngineTokenizer
from workloads.generation.speculation.make import make_speculator
from workloads.model.transformer import Transformer


def make_engine(
    section: PagedEngineConfig,
    model: Transformer,
    tokenizer: EngineTokenizer | None,
    kernels: str | None = None,
    smaller: Smaller | None = None,
    capacity_factor: float | None = None,
) -> Engine:
    """See `workloads.generation.engines.make_engine`."""
    speculator = None
    if section.speculation is not None:
        speculator = make_speculator(section.speculation, model, tokenizer, section.max_running)
    return Engine(
        model,
        tokenizer,
        max_running=section.max_running,
        cache_tokens=section.cache_tokens,
        block_tokens=section.block_tokens,
        prefill_tokens=section.prefill_tokens,
        speculation=speculator,
        kernels=kernels,
        smaller=smaller,
        capacity_factor=capacity_factor,
    )
