"""Ray Serve's autoscaling hook: its context and our replicas' own figures become a `Load`, `policy.decide` decides.

Serve's controller calls `ScalingPolicy` ten times a second and is the only one who does. `escala rollouts scale` moves
the user's bounds (`min_replicas`, `max_replicas`, `target_ongoing_requests` of Serve's own AutoscalingConfig: those
three change without a restart of replicas); where the service is governed, the governor moves the policy's within them,
once a window. Serve's own delays must be 0: the policy's persistence is enough.

A record of every decision that changes the count, and of one load every ten seconds, goes to the controller's log as
`escala-scaling {...}`: `policy.replay` takes them. What there shall be and what was used goes to the board, once a
window.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from escala.contract.records import Rates
from escala.rollouts import board
from escala.rollouts.governed import measurement_of, rules_of
from escala.rollouts.governor import Governor, GovernorState, Measurement, Targets
from escala.rollouts.policy import History, Load, Rules, ScalingDecision, decide
from escala.rollouts.service import Accounts, Reading
from escala.schema.governor import GovernorConfig

RECORD_SECONDS = 10.0
WINDOW_SECONDS = 5.0  # of a service without a governor: how often its accounts are written
LOGGER = logging.getLogger("ray.serve")
METRICS = ("running_requests", "waiting_requests", "queued_tokens", "tokens_per_second")
"""What a replica's `record_autoscaling_stats` returns; tokens_per_second is 0 where it has not worked yet."""
READINGS = (
    "latency_seconds",
    "ttft_seconds",
    "generation_seconds",
    "joules",
    "counted",
    "tokens",
    "power_refused",
    "capacity_refused",
)
"""More of them, for the accounts and the governor; -1 where a figure is not known."""


class ScalingPolicy:
    """Serve's policy object.

    Args:
        governor: `GovernorConfig` as plain data; None: the user's bounds hold as they are.
        rates: `Rates` as plain data, for the accounts; None: carbon is not known.
        write: where the accounts go, by application.
        drain_seconds, up_seconds, down_seconds, spare: see `Rules`, whose other fields Serve's configuration gives.

    Raises SpecError where the governor's gains are not stable.
    """

    def __init__(
        self,
        *,
        governor: Mapping[str, Any] | None = None,
        rates: Mapping[str, Any] | None = None,
        write: Callable[[str, dict[str, Any]], None] = board.write_service,
        **rules: float,
    ) -> None:
        self._config = None if governor is None else GovernorConfig.model_validate(governor)
        self._rates = None if rates is None else Rates(**rates)
        self._write = write
        self._rules = rules
        self._window_seconds = WINDOW_SECONDS if self._config is None else self._config.window_seconds
        if self._config is not None:
            Governor(*rules_of(self._config, 1, 1, 1))

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
        service = dict(state.get("service", {}))
        if load.seconds - service.get("seconds", float("-inf")) >= self._window_seconds:
            service = self._window(context, load, rules, service)
        decision = decide(load, _governed(rules, service.get("targets")), History(**state.get("history", {})))
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
            "service": service,
        }

    def _window(self, context: Any, load: Load, rules: Rules, service: dict[str, Any]) -> dict[str, Any]:
        """The accounts and, where there is one, the governor, a window later."""
        readings = readings_of(context)
        ready = int(context.current_num_replicas)
        before = Accounts.of(service["accounts"]) if "accounts" in service else Accounts()
        accounts = before.update(load.seconds, ready, load.replicas, readings)
        found: dict[str, Any] = {"seconds": load.seconds, "accounts": accounts.to_plain()}
        measured: Measurement | None = None
        if self._config is not None:
            governor = self._governor(rules, service.get("governor"))
            measured = self._measure(load, governor, ready, readings, accounts, before)
            found["targets"] = asdict(governor.step(measured))
            found["governor"] = asdict(governor.state)
        self._write(
            context.app_name,
            {
                "seconds": load.seconds,
                "targets": found.get("targets"),
                "measured": None if measured is None else _finite(asdict(measured)),
                "ready_replicas": ready,
                "startup_seconds": accounts.startup_seconds,
                **accounts.used(self._rates),
            },
        )
        return found

    def _governor(self, rules: Rules, state: Mapping[str, Any] | None) -> Governor:
        assert self._config is not None  # its caller asked
        batch = max(round(rules.requests_per_replica), 1)
        gains, kept = rules_of(self._config, rules.min_replicas, rules.max_replicas, batch)
        return Governor(gains, kept, None if state is None else GovernorState(**state))

    def _measure(
        self,
        load: Load,
        governor: Governor,
        ready: int,
        readings: Mapping[str, Reading],
        accounts: Accounts,
        before: Accounts,
    ) -> Measurement:
        assert self._config is not None  # its caller asked
        is_latency = self._config.metric == "latency"
        seen = [r.latency_seconds if is_latency else r.ttft_seconds for r in readings.values()]
        generating = [r.generation_seconds for r in readings.values()] if is_latency else []
        startup = accounts.startup_seconds
        if startup is None and self._config.replica is not None:
            startup = self._config.replica.startup_seconds
        return measurement_of(
            load,
            governor.rules,
            ready=ready,
            latency_seconds=_most(seen),
            generation_seconds=_most(generating),
            measured_seconds=min((r.seconds for r in readings.values()), default=None),
            startup_seconds=startup,
            watts=_watts(before, accounts),
            refused=tuple(sorted({name for r in readings.values() for name in r.refused})),
            forecasts=is_latency,
        )


def _governed(rules: Rules, targets: Mapping[str, Any] | None) -> Rules:
    """The policy's rules with the governor's bounds, within the user's, which may have moved since."""
    if targets is None:
        return rules
    kept = Targets(**targets)
    return replace(
        rules,
        min_replicas=rules.clamp(kept.min_replicas),
        max_replicas=max(rules.clamp(kept.max_replicas), 1),
        requests_per_replica=min(kept.requests_per_replica, rules.requests_per_replica),
    )


def _finite(measured: dict[str, Any]) -> dict[str, Any]:
    """As JSON can say it: no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in measured.items()}


def _most(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _watts(before: Accounts, now: Accounts) -> float | None:
    """Mean power since the last window, at the meter."""
    used = [accounts.used(None)["joules"] for accounts in (before, now)]
    if None in used or before.seconds is None or now.seconds is None or now.seconds <= before.seconds:
        return None
    return float((used[1] - used[0]) / (now.seconds - before.seconds))


def readings_of(context: Any) -> dict[str, Reading]:
    """What each replica measured last, by its id."""
    raw = context.raw_metrics or {}
    found = {}
    for replica in raw.get("joules", {}):
        last = {name: raw[name][replica][-1] for name in READINGS if raw.get(name, {}).get(replica)}
        if len(last) < len(READINGS):
            continue  # it has not reported yet
        value = {name: None if sample.value < 0 else float(sample.value) for name, sample in last.items()}
        refused = {"power": value["power_refused"], "capacity factor": value["capacity_refused"]}
        found[str(getattr(replica, "unique_id", replica))] = Reading(
            seconds=last["joules"].timestamp,
            latency_seconds=value["latency_seconds"],
            ttft_seconds=value["ttft_seconds"],
            generation_seconds=value["generation_seconds"],
            joules=value["joules"],
            counted=bool(value["counted"]),
            tokens=value["tokens"] or 0.0,
            refused=tuple(name for name, refuses in refused.items() if refuses),
        )
    return found


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
