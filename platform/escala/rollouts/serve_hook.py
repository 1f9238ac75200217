"""Ray Serve's autoscaling hook: its context and our replicas' own figures become a `Load`, `policy.decide` decides.

Serve's controller calls `ScalingPolicy` ten times a second and is the only one who does; `escala rollouts scale` and
the governor move its bounds and its target (`min_replicas`, `max_replicas`, `target_ongoing_requests` of Serve's own
AutoscalingConfig: those three change without a restart of replicas). Serve's own delays must be 0: the policy's
persistence is enough.

A record of every decision that changes the count, and of one load every ten seconds, goes to the controller's log as
`escala-scaling {...}`: `policy.replay` takes them.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any

from escala.rollouts.policy import History, Load, Rules, ScalingDecision, decide

RECORD_SECONDS = 10.0
LOGGER = logging.getLogger("ray.serve")
METRICS = ("running_requests", "waiting_requests", "queued_tokens", "tokens_per_second")
"""What a replica's `record_autoscaling_stats` returns; tokens_per_second is 0 where it has not worked yet."""


class ScalingPolicy:
    """Serve's policy object.

    Args:
        drain_seconds, up_seconds, down_seconds, spare: see `Rules`, whose other fields Serve's configuration gives.
    """

    def __init__(self, **rules: float) -> None:
        self._rules = rules

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The count that there shall be, and the state that Serve hands back at the next call."""
        rules = Rules(
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
            requests_per_replica=float(context.config.target_ongoing_requests),
            **self._rules,
        )
        state = dict(context.policy_state or {})
        load = load_of(context, state.get("speed"))
        decision = decide(load, rules, History(**state.get("history", {})))
        recorded = state.get("recorded")
        if (
            decision.replicas != load.replicas
            or recorded is None
            or load.seconds - recorded >= RECORD_SECONDS
        ):
            recorded = load.seconds
            LOGGER.info("escala-scaling %s", record(load, decision))
        return decision.replicas, {
            "history": asdict(decision.history),
            "speed": load.tokens_per_second,
            "recorded": recorded,
        }


def load_of(context: Any, last_speed: float | None) -> Load:
    """The load that a Serve context shows.

    Requests that still wait at a handle are no engine's yet, and nobody has counted their tokens: each is taken for
    an average one of those that were.

    Args:
        last_speed: tokens/s of one replica when one last worked.
    """
    metrics = context.aggregated_metrics or {}
    running, waiting, tokens = (sum(metrics.get(name, {}).values()) for name in METRICS[:3])
    at_handles = float(context.total_queued_requests or 0.0)
    known = running + waiting
    speeds = [speed for speed in metrics.get("tokens_per_second", {}).values() if speed > 0]
    return Load(
        seconds=context.current_time,
        replicas=context.target_num_replicas,
        running_requests=running,
        queued_requests=waiting + at_handles,
        queued_tokens=tokens * (1 + at_handles / known) if known else tokens,
        tokens_per_second=sum(speeds) / len(speeds) if speeds else last_speed,
    )


def record(load: Load, decision: ScalingDecision) -> str:
    """One line of JSON."""
    return json.dumps({**asdict(load), "decided": decision.replicas, "reason": decision.reason})
