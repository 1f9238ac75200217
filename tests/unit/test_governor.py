"""The governor: settling without overshoot, anti-windup, bounds, holding, the order of its actuators."""

import json
import math
import random
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from escala.contract.errors import SpecError
from escala.rollouts.governor import Gains, Governor, GovernorRules, GovernorState, Measurement
from escala.rollouts.stability import Plant, propose_gains
from tests.unit.linear_plant import counts, settled

PLANT = Plant(0.3, 2, 1)
GAINS = Gains(*propose_gains(PLANT))


def governor(**rules: Any) -> Governor:
    return Governor(GAINS, GovernorRules(10.0, PLANT, **{"max_replicas": 4, **rules}))


def measured(window: int, latency: float | None, replicas: int = 1, **more: Any) -> Measurement:
    return Measurement(5.0 * window, latency, replicas, **more)


@pytest.mark.parametrize("delay", [0, 1, 2, 3])
@pytest.mark.parametrize("tau", [0.5, 1, 2, 4])
@pytest.mark.parametrize("load", [2, 3, 4, 5])
def test_a_constant_load_gets_its_replicas_in_time_and_no_more(delay: int, tau: float, load: int) -> None:
    for gain in (0.1, 0.3, 0.6):
        plant = Plant(gain, tau, delay)
        found = counts(plant, Gains(*propose_gains(plant)), lambda _: load)
        assert found[-1] == max(found) == load
        assert found == sorted(found)  # no reversal
        assert settled(found) <= 2 * delay + 2 * tau + 1


def test_any_constant_load_is_passed_by_one_replica_at_most_and_never_reversed() -> None:
    draw = random.Random(0)
    late = 0
    for _ in range(300):
        plant = Plant(draw.uniform(0.1, 0.6), draw.uniform(0.5, 4), draw.uniform(0, 3))
        load = draw.uniform(1, 6)
        found = counts(plant, Gains(*propose_gains(plant)), lambda _, load=load: load)  # type: ignore[misc]
        assert found == sorted(found)
        assert found[-1] <= math.ceil(load) + 1
        late += settled(found) > 2 * plant.delay + 2 * plant.time_constant + 1
    assert (
        late < 75
    )  # a load just above a whole number leaves a small error, which the sum takes its time for


@pytest.mark.parametrize("twice", [False, True])
def test_a_load_that_falls_releases_its_replicas_once(twice: bool) -> None:
    gains = Gains(*propose_gains(PLANT))
    plant = replace(PLANT, gain=2 * PLANT.gain) if twice else PLANT
    found = counts(
        plant, gains, lambda window: 5 if window < 40 else 2, rules=GovernorRules(10, PLANT, max_replicas=9)
    )
    assert found[-1] in (2, 3)
    if not twice:
        assert max(found) <= 6
        assert found[42:] == sorted(found[42:], reverse=True)


def test_without_anti_windup_the_replicas_stay_when_the_load_is_gone() -> None:
    def overloaded(window: int) -> float:
        return 8.0 if window < 40 else 1.0

    class Winding(Governor):
        def _control(self, error: float, measured: Measurement) -> float:
            total = self.state.total + self.gains.ki * error
            wanted = total + self.gains.kp * error
            count = min(max(math.ceil(wanted), 1), self.rules.max_replicas)
            self.state = replace(self.state, total=total, replicas=count)
            return wanted

    rules = GovernorRules(10.0, PLANT, max_replicas=4)
    bounded = counts(PLANT, GAINS, overloaded, rules=rules)
    winding = counts(PLANT, GAINS, overloaded, rules=rules, kind=Winding)
    assert max(bounded) == max(winding) == 4
    assert max(bounded[50:]) < 4
    assert winding[80] == 4


def test_bounds_hold_whatever_was_measured() -> None:
    draw = random.Random(1)
    made = governor(min_replicas=2, max_replicas=5, min_batch=2, max_batch=8, power_shares=(1.0, 0.7))
    absurd: list[float | None] = [None, math.nan, math.inf, -1.0, 1e9, 0.0, 3.0, 50.0]
    for window in range(500):
        found = made.step(
            measured(
                window,
                draw.choice(absurd),
                draw.randint(0, 9),
                wanted_replicas=draw.choice([None, 0, 3, 99]),
                measured_seconds=draw.choice([None, 5.0 * window - 100]),
                one_fewer_seconds=draw.choice([None, math.inf, 1.0]),
                backlog_seconds=draw.choice([None, 0.0, 5.0]),
                queued_requests=draw.choice([0.0, 30.0]),
                startup_seconds=draw.choice([None, 3.0, 1e6]),
                refused=draw.choice([(), ("power",)]),
            )
        )
        assert 2 <= found.min_replicas <= found.max_replicas <= 5
        assert 2 <= found.batch_limit <= 8
        assert found.power_share in (None, 1.0, 0.7)
        assert GovernorState(**json.loads(json.dumps(asdict(made.state)))) == made.state


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (measured(9, None), "no latency"),
        (measured(9, math.nan), "absurd"),
        (measured(9, -3.0), "absurd"),
        (measured(9, 1e7), "absurd"),
        (measured(9, 30.0, replicas=-1), "absurd"),
        (measured(9, 30.0, measured_seconds=5.0), "40 s old"),
    ],
)
def test_a_measurement_that_says_nothing_moves_nothing(bad: Measurement, said: str) -> None:
    made = governor()
    for window in range(6):
        made.step(measured(window, 25.0, 4))
    before = made.state
    found = made.step(bad)
    assert found.held
    assert said in found.reason
    assert made.state == before
    assert (found.min_replicas, found.max_replicas) == (before.replicas, 4)


def test_replicas_that_do_not_come_are_said_and_no_more_are_asked_for() -> None:
    made = governor()
    found = [made.step(measured(window, 60.0, replicas=1, startup_seconds=10.0)) for window in range(40)]
    assert not found[0].held
    assert found[-1].held
    assert "1 of 4 replicas are ready after" in found[-1].reason
    assert made.state.replicas <= 4
    assert not made.step(measured(40, 60.0, replicas=4, startup_seconds=10.0)).held


def test_work_that_is_done_before_a_replica_would_be_ready_brings_none() -> None:
    made = governor()
    for window, backlog in enumerate([40.0, 34.0, 28.0, 22.0]):
        found = made.step(measured(window, backlog, backlog_seconds=backlog, startup_seconds=40.0))
        if window:
            assert "before a replica would be ready" in found.reason
            assert (found.min_replicas, found.max_replicas) == (made.state.replicas, made.state.replicas)
    growing = governor()
    for window in range(4):
        found = growing.step(measured(window, 20.0, backlog_seconds=10.0 + 5 * window, startup_seconds=40.0))
        assert found.max_replicas == 4


def test_that_is_believed_for_one_start_up_only() -> None:
    made = governor()
    reasons = [
        made.step(measured(window, 30.0, backlog_seconds=30.0 - window, startup_seconds=30.0 * 5)).reason
        for window in range(34)
    ]
    waited = ["before a replica" in reason for reason in reasons]
    assert waited[1:29] == [True] * 28
    made = governor()
    reasons = [
        made.step(
            measured(window, 30.0, backlog_seconds=300.0 - 60 * (window % 2), startup_seconds=30.0)
        ).reason
        for window in range(6)
    ]
    assert not all("before a replica" in reason for reason in reasons)


def test_a_superfluous_replica_goes_in_a_few_windows_and_then_the_policy_may_bring_it_back() -> None:
    made = governor(max_replicas=2)
    found = [
        made.step(measured(w, 4.0, 2, wanted_replicas=2, one_fewer_seconds=4.0, startup_seconds=5.0))
        for w in range(8)
    ]
    first = next(w for w, targets in enumerate(found) if targets.max_replicas == 1)
    assert 1 <= first <= 4
    assert made.step(measured(9, 4.0, 1, wanted_replicas=1, one_fewer_seconds=5.0)).max_replicas == 2


def test_the_policys_own_count_is_followed() -> None:
    made = governor()
    found = made.step(measured(0, 9.0, 1, wanted_replicas=3, one_fewer_seconds=math.inf))
    assert made.state.replicas == 3
    assert (found.min_replicas, found.max_replicas) == (3, 4)


def test_slower_replicas_than_the_gains_are_for_make_it_slower() -> None:
    quick, slow = (governor(max_replicas=16) for _ in range(2))
    for window in range(3):
        quick.step(measured(window, 30.0, 16, startup_seconds=5.0))
        slow.step(measured(window, 30.0, 16, startup_seconds=100.0))
    assert slow.state.total < quick.state.total


def test_actuators_move_in_order_and_back() -> None:
    made = governor(
        max_replicas=2,
        min_batch=4,
        max_batch=16,
        capacity_factors=(2.0, 1.25, 1.0),
        power_shares=(1.0, 0.8, 0.6),
    )
    calm = [made.step(measured(w, 1.0, 1, one_fewer_seconds=1.25)) for w in range(16)]
    assert [t.power_share for t in calm] == [1.0] * 5 + [0.8] * 6 + [0.6] * 5  # each has its effect first
    slow = [made.step(measured(w, 100.0, 2, queued_requests=9.0)) for w in range(16, 40)]
    assert slow[0].power_share == 1.0
    assert slow[-1].capacity_factor == 1.0
    raised = next(w for w, t in enumerate(slow) if t.min_replicas == 2)
    lowered = next(w for w, t in enumerate(slow) if t.capacity_factor == 1.25)
    assert raised + 4 < lowered
    crowded = [
        made.step(measured(w, 100.0, 2)) for w in range(40, 56)
    ]  # nothing waits: the batch itself is slow
    assert crowded[-1].batch_limit == 4
    assert made.step(measured(56, 100.0, 2, queued_requests=3.0)).batch_limit == 8
    back = [made.step(measured(w, 1.0, 2, wanted_replicas=2, one_fewer_seconds=1.0)) for w in range(57, 92)]
    factors = [t.capacity_factor for t in back]
    assert factors.index(1.25) < factors.index(2.0)
    assert back[-1].power_share == 0.6
    assert back[-1].batch_limit == 16


def test_an_actuator_that_refuses_is_left_alone_and_named() -> None:
    made = governor(max_replicas=1, capacity_factors=(2.0, 1.0), power_shares=(1.0, 0.5))
    found = made.step(measured(0, 1.0, refused=("power",)))
    assert found.power_share is None
    assert "power refused" in found.reason
    late = [made.step(measured(w, 100.0, refused=("power",))) for w in range(1, 8)]
    assert late[-1].capacity_factor == 1.0


def test_an_idle_service_with_a_minimum_of_none_may_go() -> None:
    made = governor(min_replicas=0)
    assert made.step(measured(0, 0.0, 1)).min_replicas == 0
    for window in range(100):  # it has gone, which is not waiting for it
        made.step(measured(window, 0.0, 0, wanted_replicas=0))
    found = made.step(measured(100, 30.0, 0, wanted_replicas=1, queued_requests=5.0))
    assert found.min_replicas >= 1
    assert not found.held


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_seconds": 0},
        {"window_seconds": math.inf},
        {"min_replicas": 3},
        {"margin": 1.0},
        {"max_step": 0},
        {"min_batch": 40},
        {"capacity_factors": (1.0, 1.25)},
        {"power_shares": (0.9, 0.8)},
    ],
)
def test_rules_that_cannot_hold_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="rules don't hold"):
        GovernorRules(**{"target_seconds": 10.0, "plant": PLANT, "max_replicas": 2, **wrong})


def test_unstable_gains_make_no_governor() -> None:
    with pytest.raises(SpecError, match="spectral radius"):
        Governor(Gains(2.0, 0.5), GovernorRules(10.0, Plant(1, 2, 2)))


@given(st.lists(st.floats(0, 1e6), max_size=30))
def test_a_state_goes_on_under_moved_bounds(latencies: list[float]) -> None:
    made = governor(max_replicas=9)
    for window, latency in enumerate(latencies):
        made.step(measured(window, latency, made.state.replicas))
    moved = Governor(GAINS, GovernorRules(10.0, PLANT, min_replicas=2, max_replicas=3), made.state)
    assert 2 <= moved.state.replicas <= 3
    assert 1.5 <= moved.state.total <= 3
