"""A step test on the running service: speeds of one replica, then the latency before and after replicas are added under
a constant number of clients; from it the plant, safe gains, and the governor's file (docs/theory E.7).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from escala.contract.errors import ClusterError, SpecError
from escala.report import Report
from escala.rollouts import deployment
from escala.rollouts.load import Answered, Service, clients
from escala.rollouts.serve_interface import Deployment, RolloutsStatus
from escala.rollouts.stability import PlantFit, check_gains, fit_plant, propose_gains
from escala.schema.governor import BatchSpeed, GovernorConfig, PlantConfig, ReplicaSpeed
from escala.settings import RolloutsSettings, Settings

PROBE_SECONDS = 8.0  # for each measurement of speed
READY_SECONDS = 600.0  # for replicas to come or go
POLL_SECONDS = 0.2
DIGITS = 3  # of figures in the file


@dataclass(frozen=True)
class TuneOptions:
    """What a step test is told.

    Args:
        target_seconds: the 95th percentile of latency that the service shall promise.
        requests: that are asked at once, all the time; None: two batches of all replicas.
        prompt_tokens, response_tokens: of each.
        seconds: before the step, and after the new replicas are ready.
        window_seconds: the governor's.
        kp, ki: the user's own gains, which are checked; None: proposed ones.
    """

    target_seconds: float
    requests: int | None = None
    prompt_tokens: int = 16
    response_tokens: int = 32
    seconds: float = 60.0
    window_seconds: float = 2.0
    kp: float | None = None
    ki: float | None = None


@dataclass(frozen=True)
class Tuned:
    """The governor's file, and the fit that it stands on."""

    config: GovernorConfig
    fit: PlantFit
    errors: tuple[tuple[float, float], ...]  # (seconds after the step, share of the target)


def tune(
    settings: Settings, rollouts: RolloutsSettings, options: TuneOptions, name: str, report: Report
) -> Tuned:
    """Test the running service. Its bounds are moved, and put back.

    Raises NotFoundError, StateError where there is no such service, or it has one replica at most; SpecError where the
    test shows no plant, and for gains that are not stable; ClusterError where requests fail.
    """
    if (options.kp is None) != (options.ki is None):
        raise SpecError("one gain alone was given", "give both --kp and --ki, or none for safe ones")
    found = deployment.status(settings, rollouts, name, weights=False)
    policy = _policy_of(found, name)
    least, most = max(policy.min_replicas or 0, 1), policy.max_replicas or 1
    if most <= least:
        raise SpecError(
            f"{name} has {most} replicas at most: a step from {least} needs one more",
            f"`escala rollouts scale --max {least + 1}`",
        )
    token = rollouts.token.get_secret_value() if rollouts.token else None
    service = Service(found.address or "", _model_of(found, token), token)
    batch = round(policy.requests_per_replica or 1)

    def bounded(low: int, high: int) -> None:
        deployment.scale(settings, low, high, None, name)
        _wait_ready(lambda: _policy_of(deployment.status(settings, rollouts, name, weights=False), name), low)

    try:
        bounded(least, least)
        report("one replica alone")
        speed = _speed(service, batch, options)
        count = options.requests or 2 * batch * most
        report(f"{count} clients, {least} replicas, {options.seconds:.0f} s; then {most}")
        step = _step(service, count, options, lambda: bounded(most, most))
    finally:
        deployment.scale(settings, policy.min_replicas, policy.max_replicas, None, name)
    errors = step.errors(options)
    after, error = [list(column) for column in zip(*errors, strict=True)]
    fit = fit_plant(after, error, most - least, options.window_seconds)
    alone, together = (step.tokens_per_second(*times) for times in step.full_batches())
    measured = speed.model_copy(
        update={
            "startup_seconds": round(step.ready - step.begun, 1),
            "together": _rounded(together / most / (alone / least)),
        }
    )
    return Tuned(_config(fit, measured, options), fit, tuple(errors))


def _config(fit: PlantFit, speed: ReplicaSpeed, options: TuneOptions) -> GovernorConfig:
    """The file's figures, rounded, are those that are checked."""
    plant = replace(
        fit.plant,
        gain=_rounded(fit.plant.gain),
        time_constant=_rounded(fit.plant.time_constant),
        delay=_rounded(fit.plant.delay),
    )
    kp, ki = propose_gains(plant) if options.kp is None or options.ki is None else (options.kp, options.ki)
    if options.kp is None:
        kp, ki = _rounded(kp), _rounded(ki)
    check_gains(kp, ki, plant)
    return GovernorConfig(
        target_seconds=options.target_seconds,
        kp=kp,
        ki=ki,
        plant=PlantConfig(gain=plant.gain, time_constant=plant.time_constant, delay=plant.delay),
        window_seconds=options.window_seconds,
        replica=speed,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _speed(service: Service, batch: int, options: TuneOptions) -> ReplicaSpeed:
    """One replica's speeds, alone and with full batches, and that of reading prompts."""
    batches = []
    for count in sorted({1, batch}):
        with clients(service, count, options.prompt_tokens, options.response_tokens) as answers:
            _wait(PROBE_SECONDS)
        seconds = max(a.done for a in answers) - min(a.sent for a in answers)
        tokens = sum(a.response_tokens for a in answers)
        batches.append(BatchSpeed(requests=count, tokens_per_second=_rounded(tokens / seconds)))
    with clients(service, 1, options.prompt_tokens, 1) as answers:
        _wait(PROBE_SECONDS / 2)
    read = len(answers) * (options.prompt_tokens + 1) / sum(a.seconds for a in answers)
    return ReplicaSpeed(batches=batches, prompt_tokens_per_second=_rounded(read), startup_seconds=0.0)


@dataclass(frozen=True)
class StepTest:
    """What was answered before and after replicas were added. Times are those of the answers.

    Attributes:
        begun, ready: when more were asked for, and when they answered.
    """

    answers: tuple[Answered, ...]
    begun: float
    ready: float

    def errors(self, options: TuneOptions) -> list[tuple[float, float]]:
        """(seconds after the step, mean error of what was answered) a window. A percentile of a few answers would be
        their largest; the first ones came from an empty service.
        """
        since = self.answers[0].done + options.seconds / 4
        found: dict[int, list[float]] = {}
        for answer in self.answers:
            if answer.done >= since:
                number = math.floor((answer.done - self.begun) / options.window_seconds)
                found.setdefault(number, []).append(answer.seconds)
        return [
            ((number + 0.5) * options.window_seconds, sum(some) / len(some) / options.target_seconds - 1)
            for number, some in sorted(found.items())
        ]

    def full_batches(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The times in which all replicas worked, before and after: without the first and last answers."""
        first, last = self.answers[0].done, self.answers[-1].sent
        return (first, self.begun), (self.ready + (last - self.ready) / 4, last)

    def tokens_per_second(self, since: float, until: float) -> float:
        """Generated in that time."""
        return sum(a.response_tokens for a in self.answers if since < a.done <= until) / (until - since)


def _step(service: Service, count: int, options: TuneOptions, act: Callable[[], None]) -> StepTest:
    """The test itself: `act` adds the replicas, and returns when they answer."""
    with clients(service, count, options.prompt_tokens, options.response_tokens) as answers:
        _wait(options.seconds)
        begun = time.monotonic()
        act()
        ready = time.monotonic()
        _wait(options.seconds)
    return StepTest(tuple(sorted(answers, key=lambda a: a.done)), begun, ready)


def _policy_of(found: RolloutsStatus, name: str) -> Deployment:
    for each in found.deployments:
        if each.name == deployment.POLICY:
            return each
    raise ClusterError(f"{name} has no replicas that generate", "`escala rollouts up` starts it")


def _model_of(found: RolloutsStatus, token: str | None) -> str:
    from escala import http_client

    if found.address is None:
        raise ClusterError("the service has no HTTP address to ask", "start it with `escala rollouts up`")
    answer = http_client.request(f"{found.address}/v1/models", token=token, timeout_seconds=30.0)
    if not answer.succeeded:
        raise ClusterError(
            f"the service does not say what it serves: {answer.text[:300]}", "set ESCALA_ROLLOUTS_TOKEN"
        )
    return str(answer.json()["data"][0]["id"])


def _wait_ready(policy: Callable[[], Deployment], count: int) -> None:
    """Until so many replicas run, and no others."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        states = [replica.state for replica in policy().replicas]
        if states == ["RUNNING"] * count:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{states} after {READY_SECONDS:g} s, not {count} running", "`escala rollouts status`"
            )
        _wait(POLL_SECONDS)


def _wait(seconds: float) -> None:
    threading.Event().wait(seconds)
