"""What the rollout service shall have in the next window: a pure step from measurements to targets (docs/theory E.7).

The error is how far the latency is above its target, as a share of the target: positive is too slow. A PI law turns it
into a number of replicas, which the policy may not fall below; where there is time to spare it may not exceed it.
`policy.py` stays the only writer of the count and reacts to demand within these bounds, which lie within the user's.
Around the law:

- **Dead band.** Nothing moves while the latency is at most the target and one replica fewer would miss it.
- **Anti-windup.** The sum stays within the bounds, so that it follows at once when the error changes its sign.
- **Rate limit.** `max_step` replicas a window.
- **Start-up.** The gains are checked for a delay. Where replicas are measured to start more slowly, gains for that
  delay are used; fewer replicas need no start-up. Work that will be done before a new replica is ready brings none, for
  as long as one takes to start.
- **The rest, in order.** Too slow: full power and, where requests wait, the full batch at once; where that and the most
  replicas are not enough, a lower capacity factor, and a smaller batch where nothing waits. Time to spare: the capacity
  factor back, and last less power. A level each time that the last one has had its effect.
- **Holding.** A measurement that is late, missing or absurd moves nothing, and replicas that do not become ready bring
  no more of them; the targets say so.

Time is the caller's: seconds of any clock that does not go back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from escala.contract.errors import SpecError
from escala.rollouts.stability import LONGEST_DELAY, Plant, check_gains, propose_gains, spectral_radius

__all__ = ["Gains", "Governor", "GovernorRules", "GovernorState", "Measurement", "Targets", "spectral_radius"]

LATENESS_WINDOWS, LATENESS_SECONDS = 3.0, 10.0  # a measurement that is older than both is late
LONGEST_SECONDS = 1e6  # a latency above it is no latency
NEVER_READY = 4.0  # start-up delays, after which a replica that is not ready is not waited for
LEAST_START_SECONDS = 30.0  # a start-up that is not known yet is taken for this, before it is called never
LARGEST_ERROR = 5.0  # of the target: one absurdly slow window shall not bring all replicas
UP_MARGIN = 0.05  # replicas by which the law's number must pass a whole one


@dataclass(frozen=True)
class Gains:
    """Of the PI law: replicas per unit of error, and of its sum over windows."""

    kp: float
    ki: float


@dataclass(frozen=True)
class GovernorRules:
    """What the governor keeps to.

    Args:
        target_seconds: the latency that the service has promised.
        plant: what one more replica does, as `escala rollouts tune` measured it.
        window_seconds: the sampling period, in which the plant's times are stated.
        min_replicas, max_replicas: the user's bounds, never left. A minimum of 0 lets an idle service go.
        margin: share of the target that must stay free with one replica fewer, before one goes.
        max_step: replicas that come or go in one window at most.
        min_batch, max_batch: requests in a replica's batch.
        capacity_factors: that a served mixture may have, from the first, which it starts with, to the lowest; empty:
            it stays.
        power_shares: of a device's full power or frequency, from 1 down; empty: it stays.

    Raises SpecError where a value is out of range.
    """

    target_seconds: float
    plant: Plant
    window_seconds: float = 5.0
    min_replicas: int = 1
    max_replicas: int = 1
    margin: float = 0.1
    max_step: int = 4
    min_batch: int = 1
    max_batch: int = 32
    capacity_factors: tuple[float, ...] = ()
    power_shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        positive = all(math.isfinite(x) and x > 0 for x in (self.target_seconds, self.window_seconds))
        _check(positive, "the target or the window is not a time", "seconds above 0")
        bounds = 0 <= self.min_replicas <= self.max_replicas and self.max_replicas >= 1
        _check(
            bounds,
            f"the bounds are {self.min_replicas} to {self.max_replicas}",
            "0 <= min <= max, max 1 or more",
        )
        _check(0 <= self.margin < 1, f"the margin is {self.margin}", "0 or more, below 1")
        _check(self.max_step >= 1, f"max_step is {self.max_step}", "1 or more")
        batch = 1 <= self.min_batch <= self.max_batch
        _check(
            batch,
            f"the batch has {self.min_batch} to {self.max_batch} requests",
            "1 <= min_batch <= max_batch",
        )
        _check(
            _falling(self.capacity_factors),
            "capacity_factors don't fall",
            "numbers above 0, the highest first",
        )
        shares = self.power_shares
        _check(
            _falling(shares) and (not shares or shares[0] == 1),
            "power_shares don't fall from 1",
            "[1, 0.8, 0.6]",
        )

    @property
    def least(self) -> int:
        """Replicas that there are at least while the service is not idle."""
        return max(self.min_replicas, 1)

    def clamp(self, replicas: int) -> int:
        """`replicas` within `least` and the most."""
        return min(max(replicas, self.least), self.max_replicas)

    def clamp_sum(self, total: float) -> float:
        """The law's sum, half a replica below `least` at least, so that the law can want `least` itself."""
        return min(max(total, self.least - 0.5), float(self.max_replicas))


def _falling(levels: tuple[float, ...]) -> bool:
    positive = all(math.isfinite(x) and x > 0 for x in levels)
    return positive and all(a > b for a, b in pairwise(levels))


def _check(good: bool, what: str, wanted: str) -> None:
    if not good:
        raise SpecError(f"The governor's rules don't hold: {what}.", f"Give {wanted}.")


@dataclass(frozen=True)
class Measurement:
    """One window, over all replicas. None: not measured.

    Args:
        seconds: when the window ended.
        latency_seconds: the 95th percentile of the latency that the target is for; 0 where nobody asked.
        replicas: that are ready.
        wanted_replicas: that the policy has decided on, those that are starting included; None: the governor's own.
        measured_seconds: when the replicas measured; None: now.
        one_fewer_seconds: what the latency would be with one replica fewer; None: by the plant's gain.
        backlog_seconds: in which the ready replicas would have done all the work that is there.
        queued_requests: that wait.
        tokens_per_second, watts: of one replica at work, of all replicas; for the record.
        startup_seconds: that a replica took until it was ready, lately.
        refused: actuators that do not obey ("power", "capacity factor").
    """

    seconds: float
    latency_seconds: float | None
    replicas: int
    wanted_replicas: int | None = None
    measured_seconds: float | None = None
    one_fewer_seconds: float | None = None
    backlog_seconds: float | None = None
    queued_requests: float = 0.0
    tokens_per_second: float | None = None
    watts: float | None = None
    startup_seconds: float | None = None
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Targets:
    """What there shall be until the next window.

    Attributes:
        min_replicas, max_replicas: the policy's bounds.
        requests_per_replica: that one is worth, Serve's `target_ongoing_requests`.
        batch_limit: requests in a replica's batch.
        capacity_factor, power_share: None: as it is.
        held: whether nothing was moved, since the measurement or the service does not allow it.
        reason: in words.
    """

    min_replicas: int
    max_replicas: int
    requests_per_replica: float
    batch_limit: int
    capacity_factor: float | None
    power_share: float | None
    held: bool
    reason: str


@dataclass(frozen=True)
class GovernorState:
    """What the governor remembers.

    Attributes:
        total: the law's sum, in replicas.
        replicas: wanted now.
        batch, capacity_level, power_level: the limit, and indices into the rules' levels.
        waited: windows in a row in which the work would have been done before another replica is ready.
        backlog: seconds of work at the last window.
        slow, calm: windows in a row that were too slow at the most replicas, or had time to spare.
        wanted_since: since when more replicas are wanted than are ready.
    """

    total: float
    replicas: int
    batch: int
    capacity_level: int = 0
    power_level: int = 0
    waited: int = 0
    backlog: float | None = None
    slow: int = 0
    calm: int = 0
    wanted_since: float | None = None

    def within(self, rules: GovernorRules) -> GovernorState:
        """The same under rules that may have changed since: the user moved the bounds, say."""
        return replace(
            self,
            total=rules.clamp_sum(self.total),
            replicas=rules.clamp(self.replicas),
            batch=min(max(self.batch, rules.min_batch), rules.max_batch),
            capacity_level=min(self.capacity_level, max(len(rules.capacity_factors) - 1, 0)),
            power_level=min(self.power_level, max(len(rules.power_shares) - 1, 0)),
        )


class Governor:
    """The controller of one service.

    Args:
        gains: checked on the rules' plant and at twice its gain.
        state: to go on from; None: from the lower bound, with everything at its best.

    Raises SpecError for gains that are not stable, with the spectral radius and gains that are.
    """

    def __init__(self, gains: Gains, rules: GovernorRules, state: GovernorState | None = None) -> None:
        check_gains(gains.kp, gains.ki, rules.plant)
        self.gains, self.rules = gains, rules
        self.state = (state or GovernorState(float(rules.least), rules.least, rules.max_batch)).within(rules)

    def step(self, measured: Measurement) -> Targets:
        """The targets after a window. They lie within the rules' bounds whatever was measured."""
        trouble = self._trouble(measured)
        if trouble is not None:
            return self._targets(measured, trouble, held=True)
        self._follow(measured)
        late = self._not_ready(measured)
        error = self._error(measured)
        acting = error if error > 0 else self._comfort(measured)
        if acting > 0 and late is not None:
            return self._targets(measured, late, held=True)
        done = self._done_before_ready(measured)
        if acting > 0 and done:
            self._move_others(measured, acting)
            return self._targets(
                measured, f"error {error:+.2f}: done before a replica would be ready", most=True
            )
        before = self.state.replicas
        wanted = self._control(acting, measured)
        self._move_others(measured, acting)
        fewer = self.state.replicas < before
        return self._targets(
            measured, f"error {error:+.2f}, {wanted:.2f} replicas wanted", most=done or fewer
        )

    def _follow(self, measured: Measurement) -> None:
        """Go on from the count that the policy has decided on."""
        if measured.wanted_replicas is not None and measured.wanted_replicas != self.state.replicas:
            count = self.rules.clamp(measured.wanted_replicas)
            self.state = replace(self.state, replicas=count, total=float(count))

    def _trouble(self, measured: Measurement) -> str | None:
        """Why nothing can be decided on this measurement."""
        latency, rules = measured.latency_seconds, self.rules
        if latency is None:
            return "no latency was measured"
        if not 0 <= latency <= LONGEST_SECONDS:  # NaN, too
            return f"a latency of {latency:g} s is absurd"
        if measured.replicas < 0 or not math.isfinite(measured.seconds):
            return "the measurement is absurd"
        age = 0.0 if measured.measured_seconds is None else measured.seconds - measured.measured_seconds
        if not age <= max(LATENESS_WINDOWS * rules.window_seconds, LATENESS_SECONDS):
            return f"the measurement is {age:.0f} s old"
        return None

    def _error(self, measured: Measurement) -> float:
        assert measured.latency_seconds is not None  # `_trouble`
        return min(measured.latency_seconds / self.rules.target_seconds - 1, LARGEST_ERROR)

    def _comfort(self, measured: Measurement) -> float:
        """How much there is to spare, as a negative error; 0 within the dead band. Where one replica fewer is foretold
        to do, that is the error which a superfluous one makes on the plant.
        """
        fewer, gain, rules = measured.one_fewer_seconds, self.rules.plant.gain, self.rules
        if fewer is None:
            return min(self._error(measured) + gain + rules.margin, 0.0)
        return -gain if fewer / rules.target_seconds - 1 + rules.margin < 0 else 0.0

    def _not_ready(self, measured: Measurement) -> str | None:
        """Why more replicas are of no use: those that were wanted do not come. Remembers since when they are."""
        wanted = self.state.replicas if measured.wanted_replicas is None else measured.wanted_replicas
        if measured.replicas >= wanted:
            self.state = replace(self.state, wanted_since=None)
            return None
        since = self.state.wanted_since
        since = measured.seconds if since is None else since
        self.state = replace(self.state, wanted_since=since)
        waited = measured.seconds - since
        if waited <= NEVER_READY * (measured.startup_seconds or LEAST_START_SECONDS):
            return None
        return f"{measured.replicas} of {wanted} replicas are ready after {waited:.0f} s"

    def _done_before_ready(self, measured: Measurement) -> bool:
        """Whether a replica that is decided on now would find the work done, going by how it went since the last
        window; believed for one start-up, and then no more until it is not so.
        """
        startup, backlog, last = measured.startup_seconds, measured.backlog_seconds, self.state.backlog
        self.state = replace(self.state, backlog=backlog)
        if startup is None or backlog is None or last is None or not backlog:
            self.state = replace(self.state, waited=0)
            return False
        slope = (backlog - last) / self.rules.window_seconds
        done = backlog + slope * startup <= 0
        self.state = replace(self.state, waited=self.state.waited + 1 if done else 0)
        return done and self.state.waited <= math.ceil(startup / self.rules.window_seconds)

    def _gains_now(self, error: float, measured: Measurement) -> Gains:
        """The gains; for more replicas such for a longer delay, where one was measured, and for fewer replicas such
        without the start-up, which only those that come have; a window's delay is left, so that one calm window takes
        nothing away.
        """
        plant, gains = self.rules.plant, self.gains
        startup = (measured.startup_seconds or 0.0) / self.rules.window_seconds
        if error > 0 and startup > plant.delay:
            slower = propose_gains(replace(plant, delay=min(startup, LONGEST_DELAY)))
            return Gains(min(slower[0], gains.kp), min(slower[1], gains.ki))
        if error < 0 and 0 < startup <= plant.delay:
            return Gains(*propose_gains(replace(plant, delay=max(plant.delay - startup, 1.0))))
        return gains

    def _control(self, error: float, measured: Measurement) -> float:
        """The PI law: the number of replicas that it wants, and the state after it."""
        rules, gains = self.rules, self._gains_now(error, measured)
        now = self.state.replicas
        total = rules.clamp_sum(self.state.total + gains.ki * error)
        wanted = total + gains.kp * error
        count = now
        if error > 0:
            count = min(max(now, math.ceil(wanted - UP_MARGIN)), now + rules.max_step)
        elif error < 0:
            count = max(min(now, math.ceil(wanted)), now - rules.max_step)
        else:
            total = wanted = min(max(total, now - 0.5), float(now))  # what is there is what is wanted
        self.state = replace(self.state, total=total, replicas=rules.clamp(count))
        return wanted

    def _move_others(self, measured: Measurement, acting: float) -> None:
        """Power, batch and capacity factor: full power and batch at once, the rest a level each time that the last one
        has had its effect.
        """
        state, rules = self.state, self.rules
        at_most = state.replicas == rules.max_replicas <= measured.replicas
        has_power = state.power_level == 0 or "power" in measured.refused
        slow = state.slow + 1 if acting > 0 and at_most and has_power else 0
        calm = state.calm + 1 if acting < 0 else 0
        power, batch, capacity = state.power_level, state.batch, state.capacity_level
        if acting > 0:
            power = 0
        if acting < 0 or (acting > 0 and measured.queued_requests > 0):
            batch = min(2 * batch, rules.max_batch)
        if slow > self._effect_windows(measured):
            slow, capacity = 0, min(capacity + 1, max(len(rules.capacity_factors) - 1, 0))
            if not measured.queued_requests:
                batch = max(batch // 2, rules.min_batch)
        elif calm > self._effect_windows(measured):
            calm = 0
            if capacity > 0:
                capacity -= 1
            elif state.replicas <= rules.least:
                power = min(power + 1, max(len(rules.power_shares) - 1, 0))
        self.state = replace(
            state, power_level=power, batch=batch, capacity_level=capacity, slow=slow, calm=calm
        )

    def _effect_windows(self, measured: Measurement) -> float:
        """Windows until what needs no start-up shows in the latency."""
        plant, startup = self.rules.plant, (measured.startup_seconds or 0.0) / self.rules.window_seconds
        return max(plant.delay - startup, 0.0) + 2 * plant.time_constant

    def _targets(
        self, measured: Measurement, reason: str, *, held: bool = False, most: bool = False
    ) -> Targets:
        """As the state has it. `most`: no more replicas than it has, whatever the policy sees."""
        rules, state = self.rules, self.state
        idle = measured.latency_seconds == 0 and not measured.queued_requests and rules.min_replicas == 0
        refused = measured.refused
        factors = () if "capacity factor" in refused else rules.capacity_factors
        shares = () if "power" in refused else rules.power_shares
        said = "".join(f"; {name} refused" for name in refused)
        return Targets(
            min_replicas=0 if idle and not held else state.replicas,
            max_replicas=state.replicas if most else rules.max_replicas,
            requests_per_replica=float(state.batch),
            batch_limit=state.batch,
            capacity_factor=factors[state.capacity_level] if factors else None,
            power_share=shares[state.power_level] if shares else None,
            held=held,
            reason=f"holds: {reason}{said}" if held else f"{reason}{said}",
        )
