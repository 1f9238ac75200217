"""Whether a control loop is stable before it is used: a first-order plant with dead time under a sampled PI law
(docs/theory E.7). Pure.

Time is counted in windows, the governor's sampling period. A window's output is held until the next one (zero-order
hold), and the sum of the errors includes the present one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from escala.contract.errors import SpecError

LONGEST_DELAY = 200.0  # windows; a plant slower than that needs longer windows, not a longer polynomial
SAFETY_FACTOR = (
    2.0  # the loop must also be stable where the plant answers twice as strongly as it was measured
)
QUICKEST = 0.7  # share of the error removed in a window without dead time: 1 would ring at twice the gain
BRISK = 1.3  # of the largest gain without overshoot
FIT_DELAYS, FIT_TIME_CONSTANTS = 81, 120  # the grid of a fit


@dataclass(frozen=True)
class Plant:
    """What one more replica does to the error, in windows' time.

    Args:
        gain: by how much the error falls in the end, above 0 (errors are shares of the target).
        time_constant: windows within which 63 % of it is there, 0 or more.
        delay: windows until anything happens, 0 or more: a replica's start-up.

    Raises SpecError where a value is out of range.
    """

    gain: float
    time_constant: float
    delay: float

    def __post_init__(self) -> None:
        good = all(map(math.isfinite, (self.gain, self.time_constant, self.delay)))
        if not good or self.gain <= 0 or self.time_constant < 0 or not 0 <= self.delay <= LONGEST_DELAY:
            raise SpecError(
                f"A plant of gain {self.gain:g}, time constant {self.time_constant:g} and delay {self.delay:g} windows "
                "cannot be controlled.",
                f"Give a gain above 0, a time constant of 0 or more, and a delay of 0 to {LONGEST_DELAY:g} windows.",
            )


def characteristic_polynomial(kp: float, ki: float, plant: Plant) -> list[float]:
    """The closed loop's, highest power first: its roots are the factors by which its motions shrink in a window.

    A delay of n + f windows, f below 1, lets the output before the last one act on the first f of a window (the
    modified z-transform; Franklin, Powell & Workman 1998, section 4.3).
    """
    whole = math.floor(plant.delay)
    part = plant.delay - whole
    tau = plant.time_constant
    pole, late = (math.exp(-1 / tau), math.exp(-(1 - part) / tau)) if tau else (0.0, 0.0)
    zeros = np.array([plant.gain * (1 - late), plant.gain * (late - pole)])
    poles = np.concatenate([[1.0, -pole], np.zeros(whole + 1)])  # (z - pole) z^(n + 1)
    if ki == 0:
        return list(np.polyadd(poles, kp * zeros))
    return list(np.polyadd(np.polymul(poles, [1.0, -1.0]), np.polymul(zeros, [kp + ki, -kp])))


def spectral_radius(kp: float, ki: float, gain: float, time_constant: float, delay: float) -> float:
    """The largest factor by which a motion of the closed loop grows in a window: below 1 it is stable.

    Args:
        kp, ki: replicas per unit of error, and of its sum over windows.
        gain, time_constant, delay: see `Plant`.
    """
    roots = np.roots(characteristic_polynomial(kp, ki, Plant(gain, time_constant, delay)))
    return float(np.abs(roots).max(initial=0.0))


def is_stable(coefficients: Sequence[float]) -> bool:
    """Whether all roots of a polynomial lie inside the unit circle, without finding them: Jury's criterion (Jury 1964),
    in the form of Schur and Cohn. Highest power first.
    """
    row = [float(c) for c in np.trim_zeros(np.asarray(coefficients, dtype=float), "f")]
    while len(row) > 1:
        first, last = row[0], row[-1]
        if abs(last) >= abs(first):
            return False
        share = last / first
        row = [a - share * b for a, b in zip(row[:-1], row[:0:-1], strict=True)]
    return True


def is_safe(kp: float, ki: float, plant: Plant) -> bool:
    """Whether the loop is stable on the plant as it was measured and on one that answers twice as strongly."""
    return all(
        is_stable(
            characteristic_polynomial(kp, ki, Plant(factor * plant.gain, plant.time_constant, plant.delay))
        )
        for factor in (1.0, SAFETY_FACTOR)
    )


def check_gains(kp: float, ki: float, plant: Plant) -> None:
    """Raise SpecError with both spectral radii, and gains that are safe, unless these are."""
    usable = math.isfinite(kp) and math.isfinite(ki) and kp >= 0 and ki > 0
    if usable and is_safe(kp, ki, plant):
        return
    safe_kp, safe_ki = propose_gains(plant)
    proposal = f"`kp: {safe_kp:.3g}`, `ki: {safe_ki:.3g}` are safe, or repeat `escala rollouts tune`"
    if not usable:
        raise SpecError(
            f"Gains kp = {kp:g} and ki = {ki:g} don't hold: kp is 0 or more, ki above 0.", proposal
        )
    once, twice = (
        spectral_radius(kp, ki, factor * plant.gain, plant.time_constant, plant.delay)
        for factor in (1.0, SAFETY_FACTOR)
    )
    raise SpecError(
        f"Gains kp = {kp:g} and ki = {ki:g} are not stable: the spectral radius is {once:.3f}, and {twice:.3f} at "
        f"twice the gain, of the plant with gain {plant.gain:g}, time constant {plant.time_constant:g} and delay "
        f"{plant.delay:g} windows; it must be below 1.",
        proposal,
    )


def propose_gains(plant: Plant) -> tuple[float, float]:
    """(kp, ki) that bring a constant load its replicas quickly, and hardly more of them.

    The law's zero cancels the plant's pole, which leaves z^(d+1) - z^d + g = 0 for a delay of d windows; g =
    d^d/(d+1)^(d+1) is its double root at d/(d+1), the largest without overshoot, and 1.3 times that passes the load by
    3.2 % at most. Time constants below half a window are taken for half of one: a zero near 0 would leave all to the
    sum.
    """
    d, tau = plant.delay, max(plant.time_constant, 0.5)
    pole = math.exp(-1 / tau)
    quick = min(QUICKEST, BRISK * (d / (d + 1)) ** d / (d + 1))
    total = quick / (plant.gain * (1 - pole))
    while not is_safe(pole * total, (1 - pole) * total, plant):
        total *= 0.9
    return pole * total, (1 - pole) * total


@dataclass(frozen=True)
class PlantFit:
    """A plant found in a step test, and how well it explains the test.

    Attributes:
        explained: share of the errors' variance, 0 to 1.
        gain_error: standard error of the gain, as if the fit's delay and time constant were known.
    """

    plant: Plant
    explained: float
    gain_error: float


def fit_plant(
    seconds: Sequence[float], errors: Sequence[float], replicas_added: int, window_seconds: float
) -> PlantFit:
    """The plant that a step test shows, by least squares over a grid of delays and time constants.

    Args:
        seconds: of each measurement since the step; negative ones are before it.
        errors: measured then, shares of the target.
        replicas_added: by the step.
        window_seconds: the governor's window, in which the plant's times are stated.

    Raises SpecError where the test shows no effect of the replicas.
    """
    t, e = np.asarray(seconds, dtype=float), np.asarray(errors, dtype=float)
    if len(t) < 6 or (t < 0).sum() < 2 or (t > 0).sum() < 3:
        raise SpecError(
            f"{len(t)} measurements, {(t < 0).sum()} of them before the step, show no plant.",
            "Give the test more time: --seconds.",
        )
    best: tuple[float, Plant, float] | None = None
    for delay in np.linspace(0.0, 0.75 * t.max(), FIT_DELAYS):
        for tau in np.geomspace(0.05, 1.0, FIT_TIME_CONSTANTS) * t.max():
            response = np.where(t > delay, -np.expm1(-np.maximum(t - delay, 0.0) / tau), 0.0)
            spread = response - response.mean()
            power = float(spread @ spread)
            if power < 1e-9:
                continue
            fall = -float(spread @ e) / power
            left = e - e.mean() + fall * spread
            loss = float(left @ left)
            if fall > 0 and (best is None or loss < best[0]):
                plant = Plant(
                    fall / replicas_added, float(tau) / window_seconds, float(delay) / window_seconds
                )
                best = loss, plant, math.sqrt(loss / max(len(t) - 4, 1) / power) / replicas_added
    if best is None or best[1].gain < 2 * best[2]:
        raise SpecError(
            f"{replicas_added} more replicas made no difference to the latency that the noise would not make.",
            "Ask for more requests at once (--requests), so that they wait for one another, or for a longer test.",
        )
    variance = float(((e - e.mean()) ** 2).sum())
    return PlantFit(best[1], 1 - best[0] / variance, best[2])
