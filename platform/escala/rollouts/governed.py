"""The governor on a service: its file as rules, and a load with its latency as a measurement. Pure.

Serve's hook and the simulator share it.
"""

from __future__ import annotations

import math

from escala.rollouts.governor import Gains, GovernorRules, Measurement
from escala.rollouts.policy import Load, Rules, demand
from escala.rollouts.stability import Plant
from escala.schema.governor import GovernorConfig

NOTHING_WAITS = 0.5  # requests that wait, in the mean of the last seconds
LAST_REPLICA_SLOWER = 1.25  # what the next lower level of power is taken to do to the latency


def rules_of(
    config: GovernorConfig, min_replicas: int, max_replicas: int, max_batch: int
) -> tuple[Gains, GovernorRules]:
    """What a governor is made from. Raises SpecError where the rules cannot hold."""
    plant = config.plant
    return Gains(config.kp, config.ki), GovernorRules(
        target_seconds=config.target_seconds,
        plant=Plant(plant.gain, plant.time_constant, plant.delay),
        window_seconds=config.window_seconds,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        margin=config.margin,
        max_step=config.max_step,
        min_batch=min(config.min_batch, max_batch),
        max_batch=max_batch,
        capacity_factors=tuple(config.capacity_factors),
        power_shares=tuple(config.power_shares),
    )


def measurement_of(
    load: Load,
    rules: GovernorRules,
    *,
    ready: int,
    latency_seconds: float | None,
    generation_seconds: float | None = None,
    measured_seconds: float | None = None,
    startup_seconds: float | None = None,
    watts: float | None = None,
    refused: tuple[str, ...] = (),
    forecasts: bool = True,
) -> Measurement:
    """A window's measurement.

    Args:
        ready: replicas that answer.
        latency_seconds: the 95th percentile that was observed; None: no response has ended, and none is overdue.
        generation_seconds: that from the first token on. Where nothing waits any more it is what the next response will
            take: what the last ones had waited is over. None: not known.
        forecasts: the latency is that of whole responses, which the work that is there foretells: the last request in
            the queue will have waited for all of it.
    """
    asked = load.running_requests + load.queued_requests
    backlog = _backlog_seconds(load, ready)
    latency = latency_seconds
    if latency is None and not asked:
        latency = 0.0
    if latency is not None and generation_seconds is not None and load.queued_requests < NOTHING_WAITS:
        latency = min(latency, generation_seconds)
    if forecasts and latency is not None and backlog is not None:
        latency = max(latency, backlog)
    return Measurement(
        seconds=load.seconds,
        latency_seconds=latency,
        replicas=ready,
        wanted_replicas=load.replicas,
        measured_seconds=measured_seconds,
        one_fewer_seconds=_one_fewer(load, rules, ready, latency),
        backlog_seconds=backlog,
        queued_requests=load.queued_requests,
        tokens_per_second=load.tokens_per_second,
        watts=watts,
        startup_seconds=startup_seconds,
        refused=refused,
    )


def _backlog_seconds(load: Load, ready: int) -> float | None:
    if not load.tokens_per_second or not ready:
        return None
    return load.queued_tokens / (load.tokens_per_second * ready)


def _one_fewer(load: Load, rules: GovernorRules, ready: int, latency: float | None) -> float | None:
    """The latency with one replica fewer, of those that are wanted: no answer in time where the others would have more
    than they can do within the target; else the same work on fewer, where requests wait for one another.
    """
    if latency is None:
        return None
    count = max(ready, load.replicas)
    if count <= 1:
        return LAST_REPLICA_SLOWER * latency
    worth = Rules(
        requests_per_replica=float(rules.max_batch), drain_seconds=rules.target_seconds, max_replicas=1
    )
    if demand(load, worth) > (1 - rules.margin) * (count - 1):
        return math.inf
    return latency * count / (count - 1) if load.queued_requests else latency
