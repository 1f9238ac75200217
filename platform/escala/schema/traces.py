"""A seeded trace of requests: how many come when, and of what size."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from escala.schema.base import Strict

TokenRange = Annotated[list[int], Field(min_length=2, max_length=2)]


class BurstConfig(Strict):
    """A time in which more requests come."""

    at_seconds: float = Field(ge=0, description="when it begins")
    seconds: float = Field(gt=0, description="how long it lasts")
    requests_per_second: float = Field(gt=0, description="in it, in place of the trace's own")


class TraceConfig(Strict):
    """Requests that come at random times (Poisson), each with numbers of tokens between two bounds."""

    seed: int = Field(0, ge=0, description="the same trace for the same seed")
    seconds: float = Field(gt=0, le=86_400, description="how long requests come")
    requests_per_second: float = Field(ge=0, le=10_000, description="outside of bursts")
    bursts: list[BurstConfig] = Field([], description="in their order, not overlapping")
    prompt_tokens: TokenRange = Field([16, 64], description="least and most of a prompt")
    response_tokens: TokenRange = Field([16, 64], description="least and most of a response")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("prompt_tokens", "response_tokens"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(f"{name} is {least} to {most}: give 1 <= least <= most")
        end = 0.0
        for burst in self.bursts:
            if burst.at_seconds < end:
                raise ValueError(f"the burst at {burst.at_seconds:g} s begins before the one before it ends")
            end = burst.at_seconds + burst.seconds
        return self
