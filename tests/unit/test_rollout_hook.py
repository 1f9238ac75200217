"""Serve's context becomes a load, and the state that Serve keeps for us brings the history back."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from escala.contract.errors import SpecError
from escala.rollouts.policy import Load, Rules, replay
from escala.rollouts.serve_hook import READINGS, ScalingPolicy, load_of
from escala.rollouts.stability import Plant, propose_gains


def context(second: float, target: int = 1, state: Any = None, queued: float = 0.0, **metrics: Any) -> Any:
    return SimpleNamespace(
        current_time=1000.0 + second,
        target_num_replicas=target,
        total_queued_requests=queued,
        aggregated_metrics=metrics,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=3,
        policy_state=state,
        app_name="app",
        current_num_replicas=target,
        raw_metrics={},
        config=SimpleNamespace(target_ongoing_requests=8),
    )


def ignore(application: str, record: dict[str, Any]) -> None:
    """No board."""


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
    policy = ScalingPolicy(up_seconds=3.0, down_seconds=5.0, write=ignore)
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
    assert ScalingPolicy(write=ignore)(context(0, target=9))[0] == 3


PLANT = Plant(1.0, 1.0, 2.0)
KP, KI = propose_gains(PLANT)
GOVERNOR = {
    "target_seconds": 4.0,
    "kp": KP,
    "ki": KI,
    "plant": {"gain": 1.0, "time_constant": 1.0, "delay": 2.0},
    "power_shares": [1.0, 0.5],
}
RATES = {
    "cluster": "c",
    "usd_per_device_hour": None,
    "gco2e_per_kwh": 360.0,
    "site_factor": 1.0,
    "static_watts": 1.0,
    "joules_per_flop": 0.0,
    "joules_per_byte": 0.0,
}


def figures(at: float, replicas: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Serve's raw metrics: a series a figure and replica, of which the last counts."""
    return {
        name: {
            replica: [
                SimpleNamespace(timestamp=at - 1, value=0.0),
                SimpleNamespace(
                    timestamp=at, value=own.get(name, -1.0 if name == "generation_seconds" else 0.0)
                ),
            ]
            for replica, own in replicas.items()
        }
        for name in READINGS
    }


class Service:
    """A governed service seen by Serve: windows of figures, and the records on its board."""

    def __init__(self, **more: Any) -> None:
        self.records: list[dict[str, Any]] = []
        self.policy = ScalingPolicy(
            governor=GOVERNOR, rates=RATES, write=lambda _, record: self.records.append(record), **more
        )
        self.target, self.state, self.second = 1, None, 0.0

    def window(
        self, replicas: dict[str, dict[str, float]], age: float = 0.5, **metrics: Any
    ) -> dict[str, Any]:
        """Five seconds later."""
        self.second += 5.0
        seen = context(self.second, self.target, json.loads(json.dumps(self.state)), **metrics)
        seen.raw_metrics = figures(1000.0 + self.second - age, replicas)
        seen.current_num_replicas = len(replicas)
        self.target, self.state = self.policy(seen)
        return self.records[-1]


def test_a_governed_service_gets_its_replicas_and_lets_them_go() -> None:
    service = Service()
    busy = {"running_requests": {"a": 8}, "waiting_requests": {"a": 20}, "queued_tokens": {"a": 900}}
    slow = {"a": {"latency_seconds": 30.0, "tokens": 100.0, "joules": 5.0}}
    for _ in range(12):
        record = service.window(slow, **busy)
    assert service.target == 3
    assert record["targets"]["power_share"] == 1.0
    assert record["measured"]["latency_seconds"] == 30.0
    calm = {name: {"latency_seconds": 1.0, "tokens": 200.0, "joules": 9.0} for name in "abc"}
    for _ in range(30):
        record = service.window(dict(list(calm.items())[: service.target]))
    assert service.target == 1
    assert record["targets"]["power_share"] == 0.5
    assert record["startup_seconds"] > 0
    assert json.dumps(record, allow_nan=False)


def test_energy_is_counted_by_replica_those_that_are_gone_too() -> None:
    service = Service()
    service.window(
        {"a": {"joules": 10.0, "tokens": 20.0}, "b": {"joules": 6.0, "tokens": 10.0, "counted": 1.0}}
    )
    record = service.window({"b": {"joules": 8.0, "tokens": 20.0, "counted": 1.0}})
    assert record["replicas"]["b"] == {
        "joules": 8.0,
        "joules_per_token": 0.4,
        "tokens": 20.0,
        "gco2e": pytest.approx(8 / 3.6e6 * 360),
        "energy_source": "counter",
    }
    assert (record["gone"]["count"], record["gone"]["joules"]) == (1, 10.0)
    assert (record["joules"], record["tokens"], record["energy_source"]) == (18.0, 40.0, "estimate")
    assert record["measured"]["watts"] == pytest.approx(2 / 5)
    record = service.window({"b": {"joules": -1.0, "tokens": 30.0}})
    assert record["joules"] is None  # a part would look like all of it
    assert record["energy_source"] is None


def test_late_and_missing_figures_hold_the_targets() -> None:
    service = Service()
    busy = {"running_requests": {"a": 8}, "waiting_requests": {"a": 20}}
    assert (
        "30 s old" in service.window({"a": {"latency_seconds": 30.0}}, age=30.0, **busy)["targets"]["reason"]
    )
    record = service.window({"a": {"latency_seconds": -1.0}}, **busy)
    assert record["targets"]["held"]
    assert "no latency" in record["targets"]["reason"]
    refused = service.window({"a": {"latency_seconds": 1.0, "power_refused": 1.0}})
    assert "power refused" in refused["targets"]["reason"]
    assert refused["targets"]["power_share"] is None


def test_the_users_bounds_stay_the_outer_ones() -> None:
    service = Service()
    for _ in range(10):
        service.window(
            {"a": {"latency_seconds": 60.0}}, running_requests={"a": 8}, waiting_requests={"a": 20}
        )
    assert service.target == 3
    moved = context(200, 3, service.state)
    moved.capacity_adjusted_max_replicas = 2
    assert service.policy(moved)[0] == 2


def test_unstable_gains_start_no_policy() -> None:
    with pytest.raises(SpecError, match="spectral radius"):
        ScalingPolicy(governor={**GOVERNOR, "kp": 3.0})
