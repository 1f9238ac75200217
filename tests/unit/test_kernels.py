"""A kernel is chosen by its best time, within the time allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from workloads.model.kernels import fastest


class Clock:
    """Time passes only where a candidate takes some."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *seconds: float) -> Callable[[], None]:
        """A candidate whose calls take `seconds` in turn, the last of them from then on."""
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_the_best_call_after_the_first_counts() -> None:
    clock = Clock()
    slow_start = clock.takes("a", 0.25, 0.0625, 0.03125, 0.125)
    chosen, best = fastest({"a": slow_start, "b": clock.takes("b", 0.0625)}, 1.0, clock)
    assert (chosen, best) == ("a", {"a": 0.03125, "b": 0.0625})


def test_candidates_take_turns_and_stay_within_the_time() -> None:
    clock = Clock()
    fastest({"a": clock.takes("a", 0.125), "b": clock.takes("b", 0.125)}, 1.0, clock)
    assert "".join(clock.calls) == "ababbaab"
    assert clock.now == 1.0


def test_without_time_the_first_call_counts_and_the_first_of_equals_wins() -> None:
    clock = Clock()
    chosen, best = fastest({"b": clock.takes("b", 3.0), "a": clock.takes("a", 3.0)}, 1.0, clock)
    assert (chosen, best) == ("b", {"b": 3.0, "a": 3.0})
    with pytest.raises(ValueError, match="no kernel"):
        fastest({}, 1.0, clock)
