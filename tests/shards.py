"""The long tests (marked `nightly` or `docs`, each with its minutes) in shards of at most SHARD_MINUTES. A commit's
hash chooses the one that CI runs, so that all of them run over a few landings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

SHARD_MINUTES = 12.0  # on two quiet cores, as CI has them; it allows 20


def long_mark(item: pytest.Item) -> pytest.Mark:
    """The mark that says how long a long test takes. Raises pytest.UsageError where it does not say."""
    mark = item.get_closest_marker("nightly") or item.get_closest_marker("docs")
    if mark is None or not isinstance(mark.kwargs.get("minutes"), int | float):
        raise pytest.UsageError(f"{item.nodeid}: mark it nightly(minutes=N) or docs(minutes=N)")
    return mark


def shards(minutes: Mapping[str, float]) -> list[list[str]]:
    """The names in shards, the longest first, each into the emptiest of the fewest shards that can hold them."""
    for count in range(1, len(minutes) + 1):
        filled: list[list[str]] = [[] for _ in range(count)]
        for name in sorted(minutes, key=lambda name: (-minutes[name], name)):
            min(filled, key=lambda shard: sum(minutes[each] for each in shard)).append(name)
        longest = max(sum(minutes[each] for each in shard) for shard in filled)
        if longest <= max(SHARD_MINUTES, *minutes.values()):
            return filled
    return []


def chosen(items: Sequence[pytest.Item], commit: str) -> tuple[list[pytest.Item], str]:
    """The items of the shard that the hash (hexadecimal) chooses, and a line that says so.

    Tests of one file stay together, for they share what they start; the pages of docs are each by themselves.
    """
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        whole = item.nodeid if long_mark(item).name == "docs" else item.nodeid.partition("::")[0]
        groups.setdefault(whole, []).append(item)
    minutes = {name: sum(long_mark(i).kwargs["minutes"] for i in group) for name, group in groups.items()}
    parts = shards(minutes)
    if not parts:
        return [], "no long tests"
    number = int(commit, 16) % len(parts)
    part = parts[number]
    said = f"shard {number + 1} of {len(parts)}, {sum(minutes[name] for name in part):.0f} minutes: {', '.join(part)}"
    kept = set(part)
    return [item for name, group in groups.items() if name in kept for item in group], said
