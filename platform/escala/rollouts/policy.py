"""How many replicas shall generate: a pure decision on the load and the policy's own history.

One replica is worth `requests_per_replica` requests at once, or the tokens that it makes in `drain_seconds`,
whichever it runs out of first; the demand is what the load asks for in such replicas. More replicas come when the
demand has stayed above the count for `up_seconds`, and fewer when it has stayed below for `down_seconds`, with
`spare` room in the smaller number: under a constant load the count moves once and then stays.

Time is the caller's: seconds of any clock that does not go back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from escala.contract.errors import SpecError


@dataclass(frozen=True)
class Rules:
    """What the decision keeps to.

    Args:
        min_replicas, max_replicas: bounds, which hold at once. A minimum of 0 lets an idle deployment go.
        requests_per_replica: that one replica serves well at once, its batch.
        drain_seconds: the queued tokens shall be done within this time.
        up_seconds, down_seconds: how long the demand must stay above or below the count.
        spare: share of the smaller number that must be left over when replicas go, 0 to below 1.

    Raises SpecError where a value is out of range.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    requests_per_replica: float = 32.0
    drain_seconds: float = 30.0
    up_seconds: float = 3.0
    down_seconds: float = 30.0
    spare: float = 0.2

    def __post_init__(self) -> None:
        bounds = f"{self.min_replicas} to {self.max_replicas}"
        _check(0 <= self.min_replicas <= self.max_replicas, f"the bounds are {bounds}", "0 <= min <= max")
        _check(self.max_replicas >= 1, f"the bounds are {bounds}", "a maximum of at least 1")
        positive = self.requests_per_replica > 0 and self.drain_seconds > 0
        _check(positive, "a replica is worth nothing", "requests_per_replica and drain_seconds above 0")
        _check(self.up_seconds >= 0 and self.down_seconds >= 0, "a delay is negative", "delays of 0 or more")
        _check(0 <= self.spare < 1, f"spare is {self.spare}", "0 or more, below 1")

    def clamp(self, replicas: int) -> int:
        """`replicas` within the bounds."""
        return min(max(replicas, self.min_replicas), self.max_replicas)


def _check(good: bool, what: str, wanted: str) -> None:
    if not good:
        raise SpecError(f"Scaling rules don't hold: {what}.", f"Give {wanted}.")


@dataclass(frozen=True)
class Load:
    """What was measured at one moment, over all replicas.

    Args:
        seconds: when.
        replicas: wanted until now, those that are starting included.
        running_requests, queued_requests: in the engines' batches; waiting, in engines or on their way to one.
        queued_tokens: that the unfinished requests may still cost, prompts and responses.
        tokens_per_second: of one replica at work; None where none has worked yet.
    """

    seconds: float
    replicas: int
    running_requests: float = 0.0
    queued_requests: float = 0.0
    queued_tokens: float = 0.0
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class History:
    """What the policy remembers: since when the demand has been above or below the count, with the least or the most
    that it asked for in that time.
    """

    above_since: float | None = None
    above_least: int = 0
    below_since: float | None = None
    below_most: int = 0


@dataclass(frozen=True)
class ScalingDecision:
    """How many replicas from now on, why, and the history for the next call."""

    replicas: int
    reason: str
    history: History


def demand(load: Load, rules: Rules) -> float:
    """The load in replicas' worth: 0 where nothing runs and nothing waits."""
    requests = (load.running_requests + load.queued_requests) / rules.requests_per_replica
    if not load.tokens_per_second:
        return requests
    return max(requests, load.queued_tokens / (load.tokens_per_second * rules.drain_seconds))


def decide(load: Load, rules: Rules, history: History) -> ScalingDecision:
    """How many replicas there shall be.

    Bounds hold at once, and a request brings a replica back from zero at once; everything else waits for its
    persistence. Monotone: more load never gives fewer replicas, for the same history.
    """
    now, count = load.seconds, load.replicas
    if rules.clamp(count) != count:
        return ScalingDecision(rules.clamp(count), "bounds", History())
    asked = demand(load, rules)
    up, down = rules.clamp(math.ceil(asked)), rules.clamp(math.ceil(asked / (1 - rules.spare)))
    if count == 0 and up > 0:
        return ScalingDecision(up, f"woken by a demand of {asked:.2f}", History())
    history = _remember(now, count, up, down, history)
    if history.above_since is not None and now - history.above_since >= rules.up_seconds:
        reason = f"demand {asked:.2f}, above {count} for {now - history.above_since:.0f} s"
        return ScalingDecision(history.above_least, reason, History())
    if history.below_since is not None and now - history.below_since >= rules.down_seconds:
        reason = f"demand {asked:.2f}, below {count} for {now - history.below_since:.0f} s"
        return ScalingDecision(history.below_most, reason, History())
    return ScalingDecision(count, f"demand {asked:.2f}", history)


def _remember(now: float, count: int, up: int, down: int, history: History) -> History:
    above_since, above_least = None, 0
    if up > count:
        again = history.above_since is not None
        above_since = history.above_since if again else now
        above_least = min(history.above_least, up) if again else up
    below_since, below_most = None, 0
    if down < count:
        again = history.below_since is not None
        below_since = history.below_since if again else now
        below_most = max(history.below_most, down) if again else down
    return History(above_since, above_least, below_since, below_most)


def replay(loads: Iterable[Load], rules: Rules) -> list[ScalingDecision]:
    """What the policy would have decided on recorded loads: the count is its own, from the first load's on."""
    decisions: list[ScalingDecision] = []
    for load in loads:
        if decisions:
            load = Load(**{**vars(load), "replicas": decisions[-1].replicas})
        decisions.append(decide(load, rules, decisions[-1].history if decisions else History()))
    return decisions
