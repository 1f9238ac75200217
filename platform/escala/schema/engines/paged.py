"""Our own engine: continuous batching over a paged cache."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from escala.schema.engines.kind import KINDS, EngineKind
from escala.schema.speculation import SpeculationConfig


@KINDS.add
class PagedEngineConfig(EngineKind):
    """The limits of `workloads.generation.engine.Engine`."""

    kind: Literal["paged"] = "paged"
    max_running: int = Field(32, gt=0, description="requests in the batch")
    cache_tokens: int | None = Field(
        None,
        gt=0,
        description="that the KV cache holds; None: max_running contexts, of each what attention needs, or 1 GiB",
    )
    block_tokens: int | None = Field(
        None, gt=0, description="of a cache block; None: as the model's attention needs it, or 32"
    )
    prefill_tokens: int = Field(512, gt=0, description="of prompts read in one step")
    speculation: SpeculationConfig | None = Field(None, description="None: no tokens are drafted")
