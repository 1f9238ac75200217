"""How many drafted tokens pay: from what steps of so many rows took, and how often drafts were what was drawn.

A step of B requests gives B tokens, and of each drafted token the probability that all before it and itself are
accepted. Those with the largest probabilities go along, as many as give the most tokens a second. No clock here.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

FEW = 4  # samples; a cost of fewer may be the machine's other work, and is tried again sooner
FRESH_STEPS = 512  # a cost that was not seen for so long is forgotten, and tried again
SLOPE = (
    0.1  # of what a row takes: assumed for each further one where nothing is known, so that it is tried once
)
MARGIN = 1.02  # of tokens a second: less is within the error of what is measured
FORGETTING = 1 / 64  # weight of the newest test of a grade, once there are as many
HALF = 1.0  # tests that a grade is thought to have had, half of them passed
OWN = 4.0  # tests after which a request's own acceptance weighs as much as its grades'


@dataclass
class _Cost:
    rows: float
    seconds: float
    samples: int
    step: int

    @property
    def kept_steps(self) -> int:
        return FRESH_STEPS if self.samples >= FEW else FRESH_STEPS // 8


class StepCosts:
    """Seconds of a step by its rows. Neighbouring numbers of rows share what was measured: up to 8 rows each has its
    own, above every range of an eighth.
    """

    def __init__(self) -> None:
        self._found: dict[int, _Cost] = {}
        self._order: list[tuple[float, float]] = []  # (rows, seconds), ascending
        self._steps = 0

    def add(self, rows: int, seconds: float) -> None:
        """A step was made. One that took three times what is known of its like was disturbed, and counts as that."""
        self._steps += 1
        key, now = _range_of(rows), self._steps
        cost = self._found.get(key)
        if cost is None:
            self._found[key] = _Cost(rows, seconds, 1, now)
        else:
            cost.samples, cost.step = min(cost.samples + 1, 8), now
            cost.rows += (rows - cost.rows) / cost.samples
            cost.seconds += (min(seconds, 3 * cost.seconds) - cost.seconds) / cost.samples
        if self._steps % 64 == 0:
            self._found = {k: c for k, c in self._found.items() if now - c.step < c.kept_steps}
        self._order = sorted((c.rows, c.seconds) for c in self._found.values())

    def knows(self, rows: int) -> bool:
        """Whether steps of so many rows, or about so many, were measured lately."""
        return _range_of(rows) in self._found

    @property
    def most(self) -> float:
        """The most rows that are known of; 0 before the first step."""
        return self._order[-1][0] if self._order else 0.0

    def seconds(self, rows: int) -> float:
        """Of a step of so many rows: between two that are known in a line, beyond them in a line with a slope that is
        that of the last two, or SLOPE of a row's cost if that is more. Raises IndexError before the first `add`.
        """
        order = self._order
        at = bisect.bisect_left(order, (rows, 0.0))
        if at == 0:
            first_rows, first = order[0]
            return first * (1 - SLOPE * (1 - rows / first_rows))
        x, y = order[at - 1]
        if at < len(order):
            next_x, next_y = order[at]
            return y + (next_y - y) * (rows - x) / (next_x - x)
        slope = SLOPE * y / x
        if at > 1:
            before_x, before_y = order[at - 2]
            slope = max(slope, (y - before_y) / (x - before_x))
        return y + slope * (rows - x)


def _range_of(rows: int) -> int:
    width = 1 << max(0, rows.bit_length() - 4)
    return rows // width * width


class Acceptance:
    """How often tokens of each grade were what was drawn, the latest counting most."""

    def __init__(self) -> None:
        self._rates: dict[int, tuple[float, float]] = {}  # (rate, tests)

    def rate(self, grade: int) -> float:
        """The probability that a token of this grade is accepted after those before it."""
        return self._rates.get(grade, (0.5, HALF))[0]

    def tested(self, grade: int, hit: bool) -> None:
        """One was compared with what was drawn."""
        rate, tests = self._rates.get(grade, (0.5, HALF))
        tests += 1
        self._rates[grade] = (rate + (hit - rate) * max(FORGETTING, 1 / tests), tests)


class RequestRecord:
    """One request's hits beside those that its drafts' grades promised: some requests are hotter than others."""

    def __init__(self) -> None:
        self._hits = self._promised = OWN

    @property
    def factor(self) -> float:
        """By which its grades' rates are multiplied."""
        return self._hits / self._promised

    def tested(self, rate: float, hit: bool) -> None:
        """A token of a grade of this rate was compared with what was drawn."""
        self._hits += hit
        self._promised += rate
        if self._promised > 4 * OWN:
            self._hits, self._promised = self._hits / 2, self._promised / 2


def best_count(chances: Sequence[float], base: int, costs: StepCosts) -> int:
    """How many drafted tokens to score beside `base` rows.

    Args:
        chances: of each to be accepted with all before it, in descending order.
        costs: of which `base` rows are known.
    """
    farthest = costs.most + max(3.0, base / 4)  # a step into what is not known yet
    best, most = 0, MARGIN * base / costs.seconds(base)
    tokens = float(base)
    for count, chance in enumerate(chances, 1):
        if base + count > farthest:
            break
        tokens += chance
        rate = tokens / costs.seconds(base + count)
        if rate > most:
            best, most = count, rate
    return best


def best_depth(chance: float, base: int, costs: StepCosts, draft_seconds: float, most: int) -> int:
    """How many tokens to draft for each of `base` requests, where drafting takes long.

    Args:
        chance: of a drafted token to be accepted after those before it.
        costs: of which `base` rows are known.
        draft_seconds: of one more token of each.
        most: tokens.
    """
    best, highest = 0, MARGIN * base / costs.seconds(base)
    tokens = survives = float(base)
    for depth in range(1, most + 1):
        survives *= chance
        tokens += survives
        rate = tokens / (costs.seconds(base * (1 + depth)) + depth * draft_seconds)
        if rate > highest:
            best, highest = depth, rate
    return best
