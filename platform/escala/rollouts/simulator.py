"""A service simulated on a trace, with the real policy and the real governor in the loop. Pure.

A replica reads prompts one after another and makes tokens at the speed that was measured for as many responses at
once; what is left waits at the ingress, from which Serve gives a replica twice its batch. The policy sees what Serve
shows it: figures of the last five seconds, once a second. A replica that was decided on is ready after its start-up;
one that goes finishes what it has.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from escala.contract.errors import SpecError
from escala.rollouts.governed import measurement_of, rules_of
from escala.rollouts.governor import Governor
from escala.rollouts.policy import History, Load, Rules, decide
from escala.rollouts.traces import Arrival
from escala.schema.governor import GovernorConfig, ReplicaSpeed

TICK_SECONDS = 0.1  # as often Serve's controller asks the policy
SAMPLE_SECONDS, LOOK_BACK_SECONDS = 1.0, 5.0  # of the figures that it shows (`escala.schema.serve`)
INGRESS_FACTOR = 2  # batches that a replica is given at once (`workloads.serve`)
LONGEST_FACTOR = 20.0  # traces' lengths, after which a service that does not get done is given up


@dataclass(frozen=True)
class Served:
    """One simulated response: when it was asked for, when its first token came, when it was done."""

    asked: float
    first_token: float
    done: float


@dataclass(frozen=True)
class Replayed:
    """What a replay came to.

    Attributes:
        responses: in the order in which they were done.
        replica_seconds: of replicas from their decision to their end.
        counts: (seconds, replicas wanted) where that changed.
        held: windows in which the governor held.
    """

    responses: tuple[Served, ...]
    replica_seconds: float
    counts: tuple[tuple[float, int], ...]
    held: int

    def percentile(self, quantile: float, first_token: bool = False) -> float:
        """Seconds of whole responses, or to the first token."""
        return _at(quantile, [(r.first_token if first_token else r.done) - r.asked for r in self.responses])


@dataclass(eq=False)
class _Request:
    arrival: Arrival
    left: float
    first_token: float | None = None


@dataclass(eq=False)
class _Replica:
    """`ready_at`: when it answers. `reading`: tokens of the prompt that is being read."""

    ready_at: float
    leaves: bool = False
    prompts: deque[_Request] = field(default_factory=deque)
    reading: float = 0.0
    running: list[_Request] = field(default_factory=list)
    made: deque[tuple[float, float]] = field(default_factory=deque)

    @property
    def ongoing(self) -> int:
        return len(self.prompts) + len(self.running)


class _Service:
    """The replicas and the ingress."""

    def __init__(self, speed: ReplicaSpeed, batch: int, replicas: int) -> None:
        self.speed, self.batch = speed, batch
        self.replicas = [_Replica(0.0) for _ in range(replicas)]
        self.ingress: deque[_Request] = deque()
        self.done: list[Served] = []

    def scale(self, now: float, wanted: int) -> None:
        """So many that do not leave."""
        staying = [r for r in self.replicas if not r.leaves]
        for _ in range(wanted - len(staying)):
            self.replicas.append(_Replica(now + self.speed.startup_seconds))
        for replica in sorted(staying, key=lambda r: (-r.ready_at, r.ongoing))[
            : max(len(staying) - wanted, 0)
        ]:
            replica.leaves = True

    def ready(self, now: float) -> list[_Replica]:
        return [r for r in self.replicas if not r.leaves and r.ready_at <= now]

    def step(self, now: float, batch_limit: int) -> None:
        """What happens in a tick."""
        while self.ingress:
            open_ = [r for r in self.ready(now) if r.ongoing < INGRESS_FACTOR * self.batch]
            if not open_:
                break
            min(open_, key=lambda r: r.ongoing).prompts.append(self.ingress.popleft())
        at_work = [r for r in self.replicas if r.ready_at <= now and r.ongoing]
        share = self.speed.together if len(at_work) > 1 else 1.0
        for replica in at_work:
            self._work(replica, now, batch_limit, share)
        self.replicas = [r for r in self.replicas if not r.leaves or r.ongoing]

    def _work(self, replica: _Replica, now: float, batch_limit: int, share: float) -> None:
        time_left, made = TICK_SECONDS * share, 0.0
        read = self.speed.prompt_tokens_per_second
        while time_left > 0 and replica.prompts and len(replica.running) < batch_limit:
            request = replica.prompts[0]
            tokens = min(request.arrival.prompt_tokens - replica.reading, time_left * read)
            replica.reading += tokens
            time_left -= tokens / read
            made += tokens
            if replica.reading >= request.arrival.prompt_tokens - 1e-9:
                replica.running.append(replica.prompts.popleft())
                replica.reading = 0.0
        if replica.running and time_left > 0:
            each = time_left * self.speed.at(len(replica.running)) / len(replica.running)
            made += each * len(replica.running)
            for request in list(replica.running):
                request.left -= each
                if request.first_token is None:
                    request.first_token = now + TICK_SECONDS
                if request.left <= 0:
                    replica.running.remove(request)
                    self.done.append(Served(request.arrival.seconds, request.first_token, now + TICK_SECONDS))
        replica.made.append((now, made))
        while now - replica.made[0][0] > 10.0:
            replica.made.popleft()

    def load(self, now: float, wanted: int) -> Load:
        """What the service's figures are now."""
        running = sum(len(r.running) for r in self.replicas)
        waiting = sum(len(r.prompts) for r in self.replicas)
        tokens = sum(q.left for r in self.replicas for q in r.running)
        tokens += sum(q.left + q.arrival.prompt_tokens for r in self.replicas for q in r.prompts)
        known = running + waiting
        tokens *= 1 + len(self.ingress) / known if known else 1.0
        speeds = [_busy_speed(r) for r in self.replicas]
        speeds = [s for s in speeds if s > 0]
        return Load(
            now,
            wanted,
            running,
            waiting + len(self.ingress),
            tokens,
            sum(speeds) / len(speeds) if speeds else None,
        )


def _busy_speed(replica: _Replica) -> float:
    busy = [made for _, made in replica.made if made > 0]
    return sum(busy) / (len(busy) * TICK_SECONDS) if busy else 0.0


def _shown(samples: Sequence[Load], now: float, wanted: int, last_speed: float | None) -> Load:
    """The mean of the last samples, as Serve aggregates its figures."""
    recent = [s for s in samples if now - s.seconds <= LOOK_BACK_SECONDS] or list(samples[-1:])
    if not recent:
        return Load(now, wanted, tokens_per_second=last_speed)
    speeds = [s.tokens_per_second for s in recent if s.tokens_per_second]
    return Load(
        now,
        wanted,
        sum(s.running_requests for s in recent) / len(recent),
        sum(s.queued_requests for s in recent) / len(recent),
        sum(s.queued_tokens for s in recent) / len(recent),
        sum(speeds) / len(speeds) if speeds else last_speed,
    )


def replay(
    trace: Sequence[Arrival], speed: ReplicaSpeed, rules: Rules, config: GovernorConfig | None = None
) -> Replayed:
    """The trace on a simulated service that starts with the least replicas, 1 at least.

    Args:
        rules: the policy's, whose bounds the governor keeps within.
        config: the governor's file; None: the policy alone.

    Raises SpecError where the service does not get done with the trace.
    """
    batch = max(round(rules.requests_per_replica), 1)
    governor = None
    if config is not None:
        governor = Governor(*rules_of(config, rules.min_replicas, rules.max_replicas, batch))
    wanted = max(rules.min_replicas, 1)
    service, history, window = _Service(speed, batch, wanted), History(), -math.inf
    samples: deque[Load] = deque(maxlen=2 * round(LOOK_BACK_SECONDS / SAMPLE_SECONDS))
    counts, held, used, now, last = [(0.0, wanted)], 0, 0.0, 0.0, None
    bounds, limit, coming = rules, batch, deque(trace)
    longest = LONGEST_FACTOR * max(trace[-1].seconds, 60.0)
    while coming or service.ingress or any(r.ongoing for r in service.replicas):
        while coming and coming[0].seconds <= now:
            service.ingress.append(_Request(coming[0], float(coming.popleft().response_tokens)))
        service.step(now, limit)
        now += TICK_SECONDS
        used += TICK_SECONDS * len(service.replicas)
        if not samples or now - samples[-1].seconds >= SAMPLE_SECONDS - 1e-9:
            samples.append(service.load(now, wanted))
        load = _shown(samples, now, wanted, last)
        last = load.tokens_per_second
        if governor is not None and config is not None and now - window >= config.window_seconds:
            window = now
            latency, generation = _observed(service, config, now)
            measured = measurement_of(
                load,
                governor.rules,
                ready=len(service.ready(now)),
                latency_seconds=latency,
                generation_seconds=generation,
                startup_seconds=speed.startup_seconds,
                forecasts=config.metric == "latency",
            )
            targets = governor.step(measured)
            held += targets.held
            limit = targets.batch_limit
            bounds = replace(
                rules, min_replicas=targets.min_replicas, max_replicas=max(targets.max_replicas, 1)
            )
        decision = decide(load, bounds, history)
        history = decision.history
        if decision.replicas != wanted:
            wanted = decision.replicas
            counts.append((now, wanted))
            service.scale(now, wanted)
        if now > longest:
            raise SpecError(
                f"after {now:.0f} s of a trace of {trace[-1].seconds:.0f} s, "
                f"{len(trace) - len(service.done)} requests are not done",
                "more replicas (--max), or fewer requests",
            )
    return Replayed(tuple(service.done), used, tuple(counts), held)


def _observed(service: _Service, config: GovernorConfig, now: float) -> tuple[float | None, float | None]:
    """95th percentiles over the last window, overdue requests included (`workloads.serving.latency`): of what is
    governed, and of whole responses from their first token on.
    """
    since = now - config.window_seconds
    ended = [s for s in service.done if s.done > since]
    open_ = [q for r in service.replicas for q in (*r.prompts, *r.running)] + list(service.ingress)
    asked = [now - q.arrival.seconds for q in open_]
    if config.metric == "ttft":
        waiting = [now - q.arrival.seconds for q in open_ if q.first_token is None]
        begun = [s.first_token - s.asked for s in service.done if s.first_token > since]
        return _percentile_with(begun, waiting), None
    generating = [now - q.first_token for q in open_ if q.first_token is not None]
    return (
        _percentile_with([s.done - s.asked for s in ended], asked),
        _percentile_with([s.done - s.first_token for s in ended], generating),
    )


def _percentile_with(ended: list[float], ages: list[float]) -> float | None:
    done = _percentile(ended)
    return _percentile([*ended, *(age for age in ages if done is None or age > done)])


def _percentile(values: list[float]) -> float | None:
    return _at(0.95, values) if values else None


def _at(quantile: float, values: list[float]) -> float:
    """The least of them that is not below that share of them."""
    return sorted(values)[math.ceil(quantile * len(values)) - 1]
