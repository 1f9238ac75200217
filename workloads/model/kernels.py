"""Kernels chosen by measurement: which of several ways to compute the same thing is fastest on this machine.

No choice is right for every CPU, so each is timed where it runs, once per job or service. Other kernels round
differently: who chooses stores the name, and whoever must give the same bits follows it (docs/theory A.9).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def fastest(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[str, dict[str, float]]:
    """The candidate whose best call takes least time, and each one's best, in seconds.

    The candidates take turns, in alternating order, until another round would not fit into `seconds`; the first round
    only warms up where there is time for a second. The best call counts, not the mean: other load on the machine only
    ever slows a call down. Of equals the first wins.

    Args:
        candidates: by name; each call computes once, and waits for its device.
        seconds: for all of them together; a first round that takes longer is finished all the same.
        clock: in seconds. `time.thread_time` where one thread computes and the machine is busy.

    Raises:
        ValueError: there is no candidate.
    """
    if not candidates:
        raise ValueError("there is no kernel to choose from")
    start = clock()
    best = _round(candidates, list(candidates), clock)
    longest, measured = clock() - start, 0
    while clock() - start + longest <= seconds:
        began = clock()
        names = list(candidates)[:: -1 if measured % 2 else 1]
        times = _round(candidates, names, clock)
        best = {name: min(times[name], best[name]) if measured else times[name] for name in candidates}
        longest, measured = max(longest, clock() - began), measured + 1
    return min(best, key=best.__getitem__), best


def _round(
    candidates: Mapping[str, Callable[[], object]], names: list[str], clock: Callable[[], float]
) -> dict[str, float]:
    times = {}
    for name in names:
        start = clock()
        candidates[name]()
        times[name] = clock() - start
    return times
