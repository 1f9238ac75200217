"""Reward functions of the tests. A module of their own: each runs in a process that imports this, and no torch."""

from __future__ import annotations

calls = 0


def share_of_e(prompts: list[str], responses: list[str]) -> list[float]:
    """1 where nothing but the letter e is said, which is the optimum."""
    return [text.count("e") / max(1, len(text)) for text in responses]


def broken_at_third(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that fails in the third iteration."""
    global calls
    calls += 1
    if calls == 3:
        raise OSError("the grader is gone")
    return share_of_e(prompts, responses)


def count_a(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(text.count("a")) for text in responses]


def nothing(prompts: list[str], responses: list[str]) -> list[float]:
    return [float("nan")] * len(responses)


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def said(prompts: list[str], responses: list[str]) -> list[float]:
    """The number that each response is."""
    return [float(response) for response in responses]
