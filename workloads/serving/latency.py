"""How long requests take, as their clients see it: 95th percentiles over the last seconds.

A request that has not ended counts as soon as it has taken longer than 95 % of those that have, so that a service that
answers nobody is slow at once. Times from the client's side begin where the service was asked (`asked`, seconds since
the epoch): what it waited before it came to this replica counts; clocks of two hosts may differ by that much.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

QUANTILE = 0.95


@dataclass(eq=False)
class RequestTiming:
    """One request: when it was asked, and when its first token came (None: not yet), by this process's clock."""

    asked: float
    first: float | None = None


class Latencies:
    """Of one replica.

    Args:
        window_seconds: over which percentiles are taken.
        clock: seconds that do not go back.
    """

    def __init__(self, window_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._window, self._clock = window_seconds, clock
        self._open: set[RequestTiming] = set()
        self._responses: deque[tuple[float, float]] = deque()
        self._generations: deque[tuple[float, float]] = deque()
        self._tokens: deque[tuple[float, float]] = deque()

    def begin(self, asked: float | None) -> RequestTiming:
        """A request has come, asked at `asked` since the epoch; None, or a time to come: now."""
        waited = 0.0 if asked is None else max(time.time() - asked, 0.0)
        timing = RequestTiming(self._clock() - waited)
        self._open.add(timing)
        return timing

    def token(self, timing: RequestTiming) -> None:
        """It has a token."""
        if timing.first is None:
            timing.first = self._clock()
            self._tokens.append((timing.first, timing.first - timing.asked))

    def end(self, timing: RequestTiming, answered: bool) -> None:
        """It is over; one that its client has left, or that was refused, says nothing about the service's speed."""
        self._open.discard(timing)
        if answered:
            now = self._clock()
            self._responses.append((now, now - timing.asked))
            self._generations.append((now, now - (timing.first or now)))

    @property
    def response_seconds(self) -> float | None:
        """The 95th percentile of whole responses; None where nothing ended and nothing is open."""
        return self._percentile(self._responses, [t.asked for t in self._open])

    @property
    def first_token_seconds(self) -> float | None:
        """That of the time to the first token."""
        return self._percentile(self._tokens, [t.asked for t in self._open if t.first is None])

    @property
    def generation_seconds(self) -> float | None:
        """That of the time from the first token on: what a response takes where nothing waits."""
        return self._percentile(self._generations, [t.first for t in self._open if t.first is not None])

    def _percentile(self, ended: deque[tuple[float, float]], begun: list[float]) -> float | None:
        now = self._clock()
        while ended and now - ended[0][0] > self._window:
            ended.popleft()
        done = percentile([seconds for _, seconds in ended])
        ages = [now - at for at in begun]
        longer = ages if done is None else [age for age in ages if age > done]
        return percentile([*(seconds for _, seconds in ended), *longer])


def percentile(values: list[float], quantile: float = QUANTILE) -> float | None:
    """The least value that is not below `quantile` of them; None of none."""
    return sorted(values)[math.ceil(quantile * len(values)) - 1] if values else None
