"""Serve's context becomes a load, and the state that Serve keeps for us brings the history back."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from escala.rollouts.policy import Load, Rules, replay
from escala.rollouts.serve_hook import ScalingPolicy, load_of


def context(second: float, target: int = 1, state: Any = None, queued: float = 0.0, **metrics: Any) -> Any:
    return SimpleNamespace(
        current_time=1000.0 + second,
        target_num_replicas=target,
        total_queued_requests=queued,
        aggregated_metrics=metrics,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=3,
        policy_state=state,
        config=SimpleNamespace(target_ongoing_requests=8),
    )


def test_a_load_sums_the_replicas_and_estimates_what_waits_at_handles() -> None:
    found = load_of(
        context(
            0,
            queued=10,
            running_requests={"a": 4, "b": 6},
            waiting_requests={"a": 10},
            queued_tokens={"a": 300, "b": 100},
            tokens_per_second={"a": 50.0, "b": 0.0},
        ),
        None,
    )
    assert found == Load(1000.0, 1, 10, 20, 600, 50.0)


def test_the_last_known_speed_stays_and_an_empty_context_is_no_load() -> None:
    assert load_of(context(0), 70.0) == Load(1000.0, 1, 0, 0, 0, 70.0)


def test_the_policy_waits_out_its_persistence_across_serves_calls(caplog: pytest.LogCaptureFixture) -> None:
    policy = ScalingPolicy(up_seconds=3.0, down_seconds=5.0)
    target, state, counts = 1, {}, []
    with caplog.at_level(logging.INFO, "ray.serve"):
        for second in range(16):
            busy = second < 8
            metrics = {"running_requests": {"a": 8}, "waiting_requests": {"a": 12}} if busy else {}
            target, state = policy(context(second, target, json.loads(json.dumps(state)), **metrics))
            counts.append(target)
    assert counts == [1] * 3 + [3] * 10 + [1] * 3
    lines = [json.loads(r.message.removeprefix("escala-scaling ")) for r in caplog.records]
    assert [line["decided"] for line in lines if line["decided"] != line["replicas"]] == [3, 1]
    loads = [Load(**{k: v for k, v in line.items() if k not in ("decided", "reason")}) for line in lines]
    assert replay(loads, Rules(1, 3, 8))  # the records are what replay takes


def test_the_bounds_of_serves_configuration_hold_at_once() -> None:
    assert ScalingPolicy()(context(0, target=9))[0] == 3
