"""Blocks and the scheduler: nothing leaks, nothing is owned twice unless shared, whatever the order of events."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.generation.blocks import BlockPool, prompt_keys
from workloads.generation.protocol import Request, SamplingParams
from workloads.generation.scheduler import RELEASED, Scheduler, Sequence

BLOCK = 4


def request(name: str, prompt: list[int], max_tokens: int = 6) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens))


def check(scheduler: Scheduler) -> None:
    """The pool's counts are those of the tables."""
    held = [s.table[s.released :] for s in (*scheduler.running, *scheduler.waiting)]
    counts = Counter(block for blocks in held for block in blocks)
    pool = scheduler.pool
    assert [pool.owners(b) for b in range(pool.total)] == [counts[b] for b in range(pool.total)]
    assert pool.free == pool.total - len(counts)


def finish_tokens(
    scheduler: Scheduler, admit: bool = True, drafted: int = 0, accepted: int = 0
) -> list[Sequence]:
    """One step with a network that always says 7; returns the sequences that ended, already removed.

    Args:
        drafted, accepted: tokens of each draft, as far as the request has room; of these.
    """
    ended = []
    room = {s: s.request.params.max_tokens - s.generated - 1 for s in scheduler.decoding}
    tiles, rows = scheduler.plan(admit, {s: (7,) * min(drafted, room[s]) for s in room})
    for work in (*tiles, *rows):
        sequence, drafts = work.sequence, len(work.draft)
        assert work.end == sequence.computed > work.start
        assert len(sequence.table) * scheduler.block_tokens >= work.end + drafts
        needed = 0 if scheduler.live is None else max(0, work.start // BLOCK + 1 - scheduler.live)
        assert RELEASED not in sequence.table[needed:]
        if work.end == len(sequence.tokens):
            kept = min(accepted, drafts)
            sequence.tokens += [7] * (kept + 1)
            if sequence.generated == sequence.request.params.max_tokens:
                scheduler.remove(sequence)
                ended.append(sequence)
            scheduler.settle(work, kept)
            if sequence not in ended and drafts:
                assert sequence.computed == len(sequence.tokens) - 1
                assert len(sequence.table) == -(-sequence.computed // scheduler.block_tokens)
    return ended


def test_keys_name_everything_before_them() -> None:
    a, b = prompt_keys(range(12), BLOCK), prompt_keys([9, *range(1, 12)], BLOCK)
    assert len(a) == 3
    assert not set(a) & set(b)  # the second and third blocks hold the same tokens after another beginning
    assert prompt_keys(range(11), BLOCK) == a[:2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 11)), max_size=120))
def test_pool_counts_owners_and_finds_what_it_has(steps: list[tuple[int, int]]) -> None:
    pool, held = BlockPool(5), []
    contents: dict[int, bytes] = {}
    for action, number in steps:
        key = bytes([number])
        if action == 0:
            block = pool.take()
            assert (block is None) == (len(set(held)) == pool.total)
            if block is not None:
                assert block not in held
                held.append(block)
                contents[block] = b""
                if not pool.known([key])[1]:
                    pool.publish(block, key)
                    contents[block] = key
        elif action == 1:
            for block in pool.known([key])[1]:
                assert contents[block] == key
                held.append(pool.share(block))
        elif held:
            pool.release(held.pop(number % len(held)))
        assert pool.free == pool.total - len(set(held))
        assert [pool.owners(b) for b in range(pool.total)] == [held.count(b) for b in range(pool.total)]
    for block in held:
        pool.release(block)
    assert sorted(pool.take() for _ in range(pool.total)) == list(range(pool.total))
    assert pool.take() is None
    with pytest.raises(RuntimeError, match="owners"):
        pool.clear()


def test_low_numbers_first_and_proven_contents_last() -> None:
    pool = BlockPool(3)
    first = pool.take()
    pool.publish(first, b"prompt")
    pool.release(pool.share(first))  # shared once, then nobody's
    pool.release(first)
    assert [pool.take(), pool.take(), pool.take()] == [1, 2, 0]
    assert pool.known([b"prompt"]) == (0, [])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 14), st.integers(1, 10), st.integers(0, 4)),
        min_size=1,
        max_size=40,
    ),
    st.integers(6, 14),
    st.integers(1, 5),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(2, 4)),
)
def test_nothing_leaks_and_everyone_finishes(
    events: list[tuple[int, int, int, int]], blocks: int, max_running: int, prefill: int, live: int | None
) -> None:
    """With `live` in a cache that is hardly larger than what one needs."""
    blocks = blocks if live is None else live + blocks // 6 - 1
    scheduler, added, gone = Scheduler(blocks, BLOCK, max_running, prefill, live), [], set()
    for action, length, tokens, group in events:
        if action <= 1:
            prompt = [group] * length  # four families of prompts: many share their first blocks
            added.append(scheduler.add(request(str(len(added)), prompt, tokens), None))
        elif action == 2:
            gone |= set(map(id, finish_tokens(scheduler, drafted=length % 8, accepted=group)))
        elif added and id(added[length % len(added)]) not in gone:
            scheduler.remove(added[length % len(added)])
            gone.add(id(added[length % len(added)]))
        check(scheduler)
    for _ in range(3000):
        if not (scheduler.running or scheduler.waiting):
            break
        gone |= set(map(id, finish_tokens(scheduler, drafted=blocks % 4, accepted=prefill % 3)))
        check(scheduler)
    assert len(gone) == len(added)
    assert scheduler.pool.free == blocks


def test_the_last_admitted_is_preempted_and_comes_back_first() -> None:
    scheduler = Scheduler(4, BLOCK, 3, 64)
    first, second = (scheduler.add(request(n, list(range(ord(n), ord(n) + 4)), 8), None) for n in "ad")
    third = scheduler.add(request("z", [1], 1), None)
    finish_tokens(scheduler)
    assert scheduler.running == [first, second]
    for _ in range(5):
        finish_tokens(scheduler)
    assert scheduler.preemptions == 1
    assert scheduler.running == [first]
    assert list(scheduler.waiting) == [second, third]
    assert (second.computed, second.table, second.generated) == (0, [], 5)
    ended = [s for _ in range(40) for s in finish_tokens(scheduler)]
    assert ended == [first, second, third]
    assert second.tokens[4:] == [7] * 8


def test_a_draft_takes_no_block_that_somebody_may_need() -> None:
    scheduler = Scheduler(6, BLOCK, 2, 64)
    first, second = (scheduler.add(request(n, [ord(n)] * 4, 12), None) for n in "ad")
    finish_tokens(scheduler)
    draft = (7,) * 9
    _, rows = scheduler.plan(True, {first: draft, second: draft})
    assert [len(work.draft) for work in rows] == [7, 3]  # of 4 free blocks each keeps one for the other
    assert (scheduler.preemptions, scheduler.pool.free) == (0, 1)
    for work in rows:
        work.sequence.tokens.append(8)
        scheduler.settle(work, 0)
    check(scheduler)
    assert (scheduler.pool.free, len(first.table), first.computed) == (2, 2, 5)


def test_draining_starts_nobody_new_but_lets_the_preempted_finish() -> None:
    scheduler = Scheduler(4, BLOCK, 3, 64)
    first, second = (scheduler.add(request(n, list(range(ord(n), ord(n) + 4)), 8), None) for n in "ad")
    while not scheduler.preemptions:
        finish_tokens(scheduler)
    third = scheduler.add(request("z", [1], 1), None)
    ended = [s for _ in range(40) for s in finish_tokens(scheduler, admit=False)]
    assert ended == [first, second]
    assert list(scheduler.waiting) == [third]


def test_prompts_are_read_in_whole_blocks_and_shared_within_a_step() -> None:
    scheduler = Scheduler(20, BLOCK, 4, 10)
    long = scheduler.add(request("long", list(range(11))), None)
    twin = scheduler.add(request("twin", list(range(11))), None)
    tiles, rows = scheduler.plan(True)
    assert [(w.sequence, w.start, w.end) for w in tiles] == [(long, 0, 8)]
    assert rows == []
    tiles, _ = scheduler.plan(True)
    assert [(w.sequence, w.start, w.end) for w in tiles] == [(long, 8, 11), (twin, 8, 11)]
    assert twin.table[:2] == long.table[:2]
    assert twin.table[2] != long.table[2]
    assert scheduler.cached_tokens == 8


def test_a_prefix_is_known_by_its_live_blocks() -> None:
    pool, keys = BlockPool(6), [bytes([n]) for n in range(6)]
    for key in keys[:5]:
        block = pool.take()
        pool.publish(block, key)
        pool.release(block, is_passed=True)
    assert pool.known(keys) == (5, [0, 1, 2, 3, 4])
    assert pool.known(keys, 2) == (5, [3, 4])
    assert [pool.take(), pool.take()] == [5, 0]  # the empty one, then the one that was passed first
    assert pool.known(keys) == (0, [])
    assert pool.known(keys, 2) == (5, [3, 4])
    pool.share(3)
    assert [pool.take(), pool.take(), pool.take(), pool.take()] == [1, 2, 4, None]
    assert pool.known(keys, 1) == (4, [3])
    assert pool.known(keys, 2) == (0, [])


def test_a_long_prompt_runs_in_the_blocks_that_are_needed_at_once() -> None:
    scheduler = Scheduler(3, BLOCK, 2, 4 * BLOCK, live=3)
    assert scheduler.room == float("inf")
    long = scheduler.add(request("long", list(range(101)), 9), None)
    most = 0
    while scheduler.running or scheduler.waiting:
        finish_tokens(scheduler)
        check(scheduler)
        most = max(most, len(set(long.table[long.released :])))
    assert (most, scheduler.preemptions, scheduler.pool.free) == (3, 0, 3)
    assert Scheduler(2, BLOCK, 2, BLOCK, live=3).room == 2 * BLOCK


def test_a_released_prefix_is_shared_until_it_is_overwritten() -> None:
    scheduler = Scheduler(12, BLOCK, 1, 64, live=2)
    prompt = list(range(22))
    for name in "ab":
        scheduler.add(request(name, prompt, 12), None)
        while scheduler.running or scheduler.waiting:
            finish_tokens(scheduler)
    assert scheduler.cached_tokens == 20
    scheduler.add(request("c", [*prompt[:9], 99, 99, 99, 99], 1), None)
    finish_tokens(scheduler)
    assert scheduler.cached_tokens == 28  # of two blocks, the second was there
