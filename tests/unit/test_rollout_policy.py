"""The scaling decision's properties: bounds, no flapping, monotone, persistence, and what idleness does."""

import itertools
import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from escala.contract.errors import SpecError
from escala.rollouts.policy import History, Load, Rules, ScalingDecision, decide, demand, replay

REPLICAS = st.integers(0, 8)
AMOUNT = st.floats(0, 1e4)
SPEED = st.none() | st.floats(0.1, 1e4)


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    low, high = sorted((draw(REPLICAS), draw(st.integers(1, 8))))
    return Rules(
        low,
        max(high, 1),
        requests_per_replica=draw(st.floats(0.5, 100)),
        drain_seconds=draw(st.floats(0.5, 100)),
        up_seconds=draw(st.floats(0, 10)),
        down_seconds=draw(st.floats(0, 60)),
        spare=draw(st.floats(0, 0.9)),
    )


LOADS = st.builds(Load, st.just(0.0), REPLICAS, AMOUNT, AMOUNT, AMOUNT, SPEED)


def every_second(loads: list[Load]) -> list[Load]:
    return [replace(load, seconds=float(second)) for second, load in enumerate(loads)]


@given(rules(), st.lists(LOADS, min_size=1, max_size=40))
def test_the_bounds_hold_always(rules: Rules, loads: list[Load]) -> None:
    for decision in replay(every_second(loads), rules):
        assert rules.min_replicas <= decision.replicas <= rules.max_replicas


@given(rules(), LOADS)
def test_a_constant_load_moves_the_count_in_one_direction_and_then_never(rules: Rules, load: Load) -> None:
    counts = [decision.replicas for decision in replay(every_second([load] * 200), rules)]
    moves = [b - a for a, b in zip([rules.clamp(load.replicas), *counts], counts, strict=False) if b != a]
    assert len(moves) <= 1
    assert len(set(counts[70:])) == 1  # after the longest delays


@given(rules(), LOADS, AMOUNT, AMOUNT, AMOUNT)
def test_more_load_never_gives_fewer_replicas(
    rules: Rules, load: Load, running: float, queued: float, tokens: float
) -> None:
    more = replace(
        load,
        running_requests=load.running_requests + running,
        queued_requests=load.queued_requests + queued,
        queued_tokens=load.queued_tokens + tokens,
    )
    assert demand(more, rules) >= demand(load, rules)
    less, most = every_second([load] * 80), every_second([more] * 80)
    for one, other in zip(replay(less, rules), replay(most, rules), strict=True):
        assert other.replicas >= one.replicas


def test_persistence_is_honoured_in_both_directions() -> None:
    rules = Rules(1, 4, requests_per_replica=10, up_seconds=3, down_seconds=20)
    busy, idle = Load(0, 1, running_requests=10, queued_requests=25), Load(0, 1)
    counts = [d.replicas for d in replay(every_second([busy] * 10 + [idle] * 40), rules)]
    assert counts[:3] == [1, 1, 1]
    assert counts[3:10] == [4] * 7
    assert counts[10:30] == [4] * 20  # 20 s after the last of the load: not before
    assert counts[30:] == [1] * 20


def test_a_burst_shorter_than_the_persistence_changes_nothing() -> None:
    rules = Rules(1, 4, requests_per_replica=10, up_seconds=3)
    busy, idle = Load(0, 1, queued_requests=100), Load(0, 1)
    pattern = ([busy] * 3 + [idle]) * 20
    assert {d.replicas for d in replay(every_second(pattern), rules)} == {1}


def test_a_load_around_a_border_does_not_flap() -> None:
    rules = Rules(1, 4, requests_per_replica=10, up_seconds=1, down_seconds=2, spare=0.2)
    around = [Load(0, 1, running_requests=10 + (-1) ** (i // 5)) for i in range(200)]  # 9 and 11, 5 s each
    counts = [d.replicas for d in replay(every_second(around), rules)]
    assert sum(a != b for a, b in itertools.pairwise(counts)) == 1  # to 2, which it keeps


def test_fewer_replicas_only_as_far_as_the_busiest_moment_of_the_window_allows() -> None:
    rules = Rules(1, 8, requests_per_replica=10, down_seconds=10, spare=0.0)
    quiet, peak = Load(0, 8, running_requests=5), Load(0, 8, running_requests=40)
    counts = [d.replicas for d in replay(every_second([quiet] * 5 + [peak] + [quiet] * 5), rules)]
    assert counts[-1] == 4


def test_tokens_count_where_the_speed_is_known() -> None:
    rules = Rules(1, 8, requests_per_replica=32, drain_seconds=10)
    load = Load(0, 1, running_requests=1, queued_tokens=6_000)
    assert demand(load, rules) == pytest.approx(1 / 32)
    assert demand(replace(load, tokens_per_second=200.0), rules) == pytest.approx(3.0)


def test_zero_is_an_option_and_a_request_ends_it_at_once() -> None:
    rules = Rules(0, 2, down_seconds=5)
    idle = [d.replicas for d in replay(every_second([Load(0, 1)] * 8), rules)]
    assert idle[-1] == 0
    assert {d.replicas for d in replay(every_second([Load(0, 1)] * 99), replace(rules, min_replicas=1))} == {
        1
    }
    assert decide(Load(50, 0, queued_requests=1), rules, History()).replicas == 1


def test_bounds_that_move_hold_at_once() -> None:
    assert decide(Load(0, 1), Rules(3, 4), History()).replicas == 3
    assert decide(Load(0, 6, running_requests=999), Rules(1, 4), History()).replicas == 4


@given(rules(), st.lists(LOADS, min_size=1, max_size=20))
def test_what_was_recorded_gives_the_same_decisions_again(rules: Rules, loads: list[Load]) -> None:
    recorded = [json.loads(json.dumps(asdict(load))) for load in every_second(loads)]
    first = replay(every_second(loads), rules)
    assert replay([Load(**values) for values in recorded], rules) == first
    assert all(ScalingDecision(**{**vars(d), "history": History(**asdict(d.history))}) == d for d in first)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_replicas": 2},
        {"min_replicas": -1},
        {"max_replicas": 0, "min_replicas": 0},
        {"requests_per_replica": 0},
        {"spare": 1.0},
        {"up_seconds": -1},
    ],
)
def test_rules_that_cannot_hold_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SpecError, match="Scaling rules"):
        Rules(**wrong)
