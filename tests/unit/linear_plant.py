"""A first-order plant with dead time, stepped window by window: the independent reference of the governor's tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from escala.rollouts.governor import Gains, Governor, GovernorRules, Measurement
from escala.rollouts.stability import Plant


def growth(
    kp: np.ndarray, ki: np.ndarray, gain: np.ndarray, tau: np.ndarray, delay: np.ndarray
) -> np.ndarray:
    """The factor by which the loops' motions grow a window, of many loops at once, by stepping them 6,000 windows from
    an error of 1; delays are whole windows.
    """
    steps, loops = 6000, len(kp)
    pole = np.exp(-1 / tau)
    line = np.zeros((loops, int(delay.max()) + 1))
    error, total, log_size = np.ones(loops), np.zeros(loops), np.zeros(loops)
    rows = np.arange(loops)
    half = np.zeros(loops)
    for step in range(steps):
        total = total + error
        line = np.roll(line, 1, axis=1)
        line[:, 0] = kp * error + ki * total
        acting = line[rows, delay.astype(int)]
        error = pole * error - gain * (1 - pole) * acting
        size = np.maximum.reduce([np.abs(error), np.abs(total), np.abs(line).max(axis=1)])
        error, total, line = error / size, total / size, line / size[:, None]
        log_size += np.log(size)
        if step == steps // 2 - 1:
            half = log_size.copy()
    return np.exp((log_size - half) / (steps - steps // 2))


def counts(
    plant: Plant,
    gains: Gains,
    load: Callable[[int], float],
    *,
    windows: int = 100,
    rules: GovernorRules | None = None,
    kind: type[Governor] = Governor,
) -> list[int]:
    """The replicas that the governor wants, window by window, of a plant whose error falls by `plant.gain` a replica
    above the load (in replicas' worth); the first window is that of 1 replica without error.
    """
    rules = rules or GovernorRules(10.0, plant, max_replicas=16)
    governor = kind(gains, rules)
    whole = math.floor(plant.delay)
    part = plant.delay - whole
    tau = plant.time_constant
    pole, late = (math.exp(-1 / tau), math.exp(-(1 - part) / tau)) if tau else (0.0, 0.0)
    given, error = [1] * (whole + 2), 0.0
    for window in range(windows):
        latency = max(rules.target_seconds * (1 + error), 0.0)
        governor.step(Measurement(5.0 * window, latency, governor.state.replicas))
        given.append(governor.state.replicas)
        asked = load(window)
        error = pole * error
        error += plant.gain * (1 - late) * (asked - given[-1 - whole])
        error += plant.gain * (late - pole) * (asked - given[-2 - whole])
    return given[whole + 2 :]


def settled(found: list[int]) -> int:
    """The window from which on the count stays."""
    return max((at + 1 for at, count in enumerate(found) if count != found[-1]), default=0)
