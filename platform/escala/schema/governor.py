"""The governor's file: what the service promises, the law's gains, and the plant that they were checked on."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator

from escala.schema.base import Strict


class PlantConfig(Strict):
    """What one more replica does (`escala.rollouts.stability.Plant`)."""

    gain: float = Field(gt=0, description="by how much the error, a share of the target, falls in the end")
    time_constant: float = Field(ge=0, description="windows within which 63 % of it is there")
    delay: float = Field(ge=0, le=200, description="windows until anything happens: a replica's start-up")


class BatchSpeed(Strict):
    """What a replica generates with so many requests in its batch."""

    requests: int = Field(ge=1, description="in the batch")
    tokens_per_second: float = Field(gt=0, description="of all of them together")


class ReplicaSpeed(Strict):
    """One replica, as `escala rollouts tune` measured it: what a replay simulates."""

    batches: list[BatchSpeed] = Field(min_length=1, description="its speed, the smallest batch first")
    prompt_tokens_per_second: float = Field(gt=0, description="read of prompts")
    startup_seconds: float = Field(ge=0, description="from the decision to the first request")
    together: float = Field(
        1.0,
        gt=0,
        le=2,
        description="factor on its speed where others work beside it, on the same machine say",
    )

    def at(self, requests: int) -> float:
        """Tokens a second with so many requests in the batch, linear between those that were measured."""
        if requests <= self.batches[0].requests:
            return self.batches[0].tokens_per_second
        for low, high in pairwise(self.batches):
            if requests <= high.requests:
                share = (requests - low.requests) / (high.requests - low.requests)
                return (1 - share) * low.tokens_per_second + share * high.tokens_per_second
        return self.batches[-1].tokens_per_second

    @field_validator("batches")
    @classmethod
    def _growing(cls, value: list[BatchSpeed]) -> list[BatchSpeed]:
        if any(low.requests >= high.requests for low, high in pairwise(value)):
            raise ValueError("each batch has more requests than the one before")
        return value


class GovernorConfig(Strict):
    """What the governor keeps to (`escala.rollouts.governor.GovernorRules`); its bounds are `scaling`'s."""

    metric: Literal["latency", "ttft"] = Field(
        "latency",
        description="whose 95th percentile is governed: of whole responses, or until the first token",
    )
    target_seconds: float = Field(gt=0, description="that the service promises")
    kp: float = Field(ge=0, description="replicas per unit of error; `escala rollouts tune` proposes it")
    ki: float = Field(
        gt=0, description="replicas per unit of error and window; `escala rollouts tune` proposes it"
    )
    plant: PlantConfig = Field(description="`escala rollouts tune` measures it")
    window_seconds: float = Field(2.0, gt=0, le=3600, description="the sampling period")
    margin: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the target that must stay free with one replica fewer, before one goes",
    )
    max_step: int = Field(4, ge=1, description="replicas that come or go in a window at most")
    min_batch: int = Field(
        1, ge=1, description="requests in a replica's batch at least; engine.max_running at most"
    )
    capacity_factors: list[float] = Field(
        [],
        description="that a served mixture may have, the first of them first, lower ones where it is too slow",
    )
    power_shares: list[float] = Field(
        [],
        description="of a device's full power or frequency, from 1 down, lower ones where there is time to spare",
    )
    replica: ReplicaSpeed | None = Field(
        None, description="for `escala rollouts replay`; None: nothing to simulate"
    )
