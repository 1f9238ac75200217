"""What every kind of generation engine is told: its limits in one replica."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from escala.schema.kinds import Kinds, KindSection


class EngineKind(KindSection):
    """The limits of one replica's engine, of whatever kind."""

    max_running: int = Field(32, gt=0, description="requests in the batch")
    max_response_tokens: int = Field(4096, gt=0, description="that a request may ask for")


KINDS = Kinds[EngineKind](default="paged")
EngineSection = Annotated[EngineKind, KINDS]
"""`engine`: its limits; `kind` where it is not the default one."""
