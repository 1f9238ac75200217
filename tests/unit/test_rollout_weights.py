"""The weight-version contract without Ray: the store, a replica's receiver, and the bounds of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from escala.contract.errors import (
    DigestMismatch,
    EscalaError,
    SpecError,
    StaleWeights,
    StateError,
    WeightsNotLoaded,
)
from escala.rollouts.store import Store
from escala.rollouts.weights import Offer, Receiver, TensorEntry, Weights, WeightVersion, digest_of, verify
from workloads.serving.engine_loading import agreed_engine


class Memory:
    """A marker that outlives its store, as the cluster's does."""

    def __init__(self) -> None:
        self.version = 0

    def read(self) -> int:
        return self.version

    def write(self, version: int) -> None:
        self.version = version


class Remote:
    """A store's methods as an actor handle shows them: `handle.method.remote(...)` is awaited."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self._store, name))})


def weights(value: float) -> Weights:
    data = np.full(1000, value, np.float32)
    entries = (TensorEntry("a", "float32", (10, 50)), TensorEntry("b", "float32", (500,)))
    return Weights(entries, (data[:500].view(np.uint8), data[500:].view(np.uint8)))


def offer(version: int, weights: Weights) -> Offer:
    future = asyncio.get_running_loop().create_future()
    future.set_result(weights)
    return Offer(WeightVersion(version, digest_of(weights), "fp32"), [future])


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def sync() -> None:
        asyncio.run(asyncio.wait_for(test(), 20))

    return sync


class Replica:
    """A receiver with a list of what it has loaded."""

    def __init__(self, stores: list[Store], name: str = "serve/a", wait_seconds: float = 5.0) -> None:
        self.loaded: list[int] = []
        self.applied: list[tuple[WeightVersion, Weights | None]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.receiver = Receiver(lambda: Remote(stores[-1]), name, self._apply, wait_seconds)

    async def _apply(self, version: WeightVersion, weights: Weights | None) -> None:
        await self.gate.wait()
        if version.precision != "fp32":
            raise WeightsNotLoaded("another precision")
        self.loaded.append(version.version)
        self.applied.append((version, weights))


async def replica_version(replica: Replica, version: int) -> list[int]:
    await replica.receiver.require(version)
    return replica.loaded


INITIAL = WeightVersion(0, digest_of(weights(0)), "fp32")


def test_the_digest_depends_on_every_byte_name_shape_and_dtype() -> None:
    one = weights(1)
    first, second = one.entries
    others = [
        weights(2),
        Weights(one.entries, (one.buffers[0], one.buffers[1][::-1].copy())),
        Weights((replace(first, name="c"), second), one.buffers),
        Weights((replace(first, shape=(50, 10)), second), one.buffers),
        Weights((replace(first, dtype="int32"), second), one.buffers),
    ]
    assert len({digest_of(w) for w in [one, *others]}) == 6
    assert digest_of(weights(1)) == digest_of(one)
    damaged = one.buffers[1].copy()
    damaged[7] ^= 1
    with pytest.raises(DigestMismatch, match="version 4"):
        verify(Weights(one.entries, (one.buffers[0], damaged)), WeightVersion(4, digest_of(one), "fp32"))


@run
async def test_versions_only_grow() -> None:
    store = Store("key", Memory())
    await store.announce(offer(3, weights(1)))
    for version in (3, 2, 0):
        with pytest.raises(StaleWeights, match="Give 4 or more"):
            await store.announce(offer(version, weights(1)))
    assert await store.newest() == 3


@run
async def test_a_replica_follows_and_a_late_one_pulls_before_it_serves() -> None:
    store = Store("key", Memory())
    early = Replica([store])
    await early.receiver.start(INITIAL)
    assert early.receiver.current == INITIAL
    await store.announce(offer(5, weights(1)))
    found = await store.acknowledgements(5, 5)
    assert (found.acknowledged, found.missing, early.loaded) == (("serve/a",), (), [5])
    late = Replica([store], "serve/b")
    await late.receiver.start(INITIAL)
    assert (late.loaded, late.receiver.current.version) == ([5], 5)
    assert (await store.acknowledgements(5, 0)).acknowledged == ("serve/a", "serve/b")


@run
async def test_the_first_choice_of_kernels_is_every_replica_s() -> None:
    store = Store("key", Memory())
    built: list[tuple[str, str | None]] = []

    def build_of(own: str) -> Callable[[str | None], Any]:
        def build(kernels: str | None) -> Any:
            built.append((own, kernels))
            return SimpleNamespace(kernels=kernels or own)

        return build

    both = await asyncio.gather(*(agreed_engine(Remote(store), None, build_of(own)) for own in ("x", "y")))
    assert both[0].kernels == both[1].kernels == (await store.describe())["kernels"]
    late = await agreed_engine(Remote(store), None, build_of("z"))
    assert (late.kernels, built[-1]) == (both[0].kernels, ("z", both[0].kernels))
    again = Store("key", Memory())  # as after its death: a replica that lives tells it
    await again.newer("serve/a", replace(INITIAL, kernels=late.kernels), 0)
    assert await again.kernels() == late.kernels


@run
async def test_a_silent_replica_is_missing_and_a_forgotten_one_is_not() -> None:
    store = Store("key", Memory())
    slow = Replica([store])
    await slow.receiver.start(INITIAL)
    slow.gate.clear()
    await store.announce(offer(1, weights(1)))
    assert (await store.acknowledgements(1, 0.05)).missing == ("serve/a",)
    assert slow.receiver.current.version == 0  # and says so in its responses
    await store.forget("serve/a")
    assert (await store.acknowledgements(1, 5)).missing == ()


@run
async def test_damaged_or_unfit_weights_are_refused_and_the_replica_answers_nothing_more() -> None:
    store = Store("key", Memory())
    replica = Replica([store])
    await replica.receiver.start(INITIAL)
    bad = offer(1, weights(1))
    await store.announce(Offer(replace(bad.weights, digest="0" * 32), bad.where))
    found = await store.acknowledgements(1, 5)
    assert "DigestMismatch" in found.refused["serve/a"]
    assert replica.loaded == []
    with pytest.raises(DigestMismatch):
        await replica.receiver.require()

    unfit = Replica([store], "serve/b")
    good = offer(2, weights(2))
    await store.announce(Offer(replace(good.weights, precision="int4"), good.where))
    with pytest.raises(WeightsNotLoaded, match="another precision"):
        await unfit.receiver.start(INITIAL)
    assert "serve/b" in (await store.acknowledgements(2, 0)).refused


@run
async def test_the_bound_of_a_request() -> None:
    store = Store("key", Memory())
    replica = Replica([store], wait_seconds=0.2)
    await replica.receiver.start(INITIAL)
    assert (await replica.receiver.require(0, 0)).version == 0
    with pytest.raises(StaleWeights, match="the newest is 0"):
        await replica.receiver.require(1)
    replica.gate.clear()
    await store.announce(offer(2, weights(1)))
    assert (await replica.receiver.require()).version == 0  # no bound asked for
    assert (await replica.receiver.require(0, 2)).version == 0
    for bound in ({"min_version": 1}, {"max_staleness": 1}, {"min_version": 2, "max_staleness": 2}):
        with pytest.raises(StaleWeights, match="0 is still served"):
            await replica.receiver.require(**bound)
    waiting = asyncio.create_task(replica.receiver.require(2))
    await asyncio.sleep(0)
    replica.gate.set()
    assert (await waiting).version == 2


@run
async def test_a_store_that_died_gives_nobody_older_weights() -> None:
    memory, stores = Memory(), []
    stores.append(Store("key", memory))
    await stores[-1].announce(offer(3, weights(1)))
    stores.append(Store("key", memory))  # what its deployment starts in its place
    replica = Replica(stores)
    with pytest.raises(WeightsNotLoaded, match="version 3 are lost"):
        await replica.receiver.start(INITIAL)
    with pytest.raises(StaleWeights):
        await stores[-1].announce(offer(3, weights(1)))
    await stores[-1].announce(offer(4, weights(2)))
    await replica.receiver.start(INITIAL)
    assert replica.receiver.current.version == 4


@run
async def test_a_replica_outlives_its_store_and_follows_the_next_one() -> None:
    memory, stores = Memory(), []
    stores.append(Store("key", memory))
    replica = Replica(stores)
    await replica.receiver.start(INITIAL)
    await stores[-1].announce(offer(1, weights(1)))
    await stores[-1].acknowledgements(1, 5)
    stores.append(Store("key", memory))
    assert (
        await replica.receiver.require(0, 0)
    ).version == 1  # the number is known, though the bytes are lost
    await replica.receiver.stop()
    again = Replica(stores)  # the first one's watch is on the dead store; this is its next look-up
    again.receiver._current = replica.receiver.current
    follow = asyncio.create_task(again.receiver._follow())
    await stores[-1].announce(offer(2, weights(2)))
    assert (await replica_version(again, 2)) == [2]
    follow.cancel()


@run
async def test_replicas_built_from_different_files_are_found() -> None:
    store = Store("key", Memory())
    await Replica([store]).receiver.start(INITIAL)
    other = replace(INITIAL, digest=digest_of(weights(9)))
    with pytest.raises(DigestMismatch, match="same model files"):
        await Replica([store], "serve/b").receiver.start(other)


@run
async def test_another_capacity_factor_is_a_version_of_the_same_weights() -> None:
    store = Store("key", Memory())
    with pytest.raises(WeightsNotLoaded, match="No replica has come"):
        await store.set_capacity(0.5)
    early = Replica([store])
    await early.receiver.start(INITIAL)
    first = await store.set_capacity(0.5)
    assert first == replace(INITIAL, version=1, capacity_factor=0.5)
    assert await store.set_capacity(0.5) == first  # again: nothing new
    assert await store.newest() == 1
    late = Replica([store], "serve/b")
    await late.receiver.start(INITIAL)
    assert (await store.acknowledgements(1, 5)).acknowledged == ("serve/a", "serve/b")
    assert early.receiver.current == late.receiver.current == first
    assert early.applied == late.applied == [(first, None)]  # nothing was fetched

    learned = offer(2, weights(1))
    learned = Offer(replace(learned.weights, capacity_factor=0.5), learned.where)
    await store.announce(learned)
    third = await store.set_capacity(None)
    assert third == replace(learned.weights, version=3, capacity_factor=None)
    last = Replica([store], "serve/c")
    await last.receiver.start(INITIAL)
    found = await store.acknowledgements(3, 5)
    assert found.acknowledged == ("serve/a", "serve/b", "serve/c")
    assert [bool(given) for _, given in last.applied] == [True]  # these weights it had not
    fourth = await store.set_capacity(2.0)
    await store.acknowledgements(4, 5)
    assert {r.receiver.current for r in (early, late, last)} == {fourth}
    assert [bool(given) for _, given in last.applied] == [True, False]
    with pytest.raises(StaleWeights, match="Give 5 or more"):
        await store.announce(offer(3, weights(2)))  # who counts by itself must not meet others' versions


@run
async def test_a_capacity_factor_that_cannot_be_is_refused_before_it_is_a_version() -> None:
    for factor in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SpecError, match="out of range"):
            await Store("key", Memory()).set_capacity(factor)
    owned = Store("key", Memory(), has_owner=True)
    await owned.register("serve/a", INITIAL)
    with pytest.raises(StateError, match="job's own service"):
        await owned.set_capacity(1.0)
    assert await owned.newest() == 0


@run
async def test_who_has_other_weights_than_those_that_nobody_published_refuses() -> None:
    store = Store("key", Memory())
    replica = Replica([store])
    await replica.receiver.start(INITIAL)
    await store.announce(Offer(WeightVersion(1, "f" * 32, "fp32", 0.5), []))
    assert "WeightsNotLoaded" in (await store.acknowledgements(1, 5)).refused["serve/a"]
    with pytest.raises(WeightsNotLoaded, match="this one has"):
        await replica.receiver.require()
    assert replica.applied == []


@run
async def test_a_store_that_died_after_a_change_of_capacity_lets_nobody_serve_another_factor() -> None:
    memory, stores = Memory(), []
    stores.append(Store("key", memory))
    old = Replica(stores)
    await old.receiver.start(INITIAL)
    changed = await stores[-1].set_capacity(0.5)
    await stores[-1].acknowledgements(1, 5)
    stores.append(Store("key", memory))
    new = Replica(stores, "serve/b")
    with pytest.raises(WeightsNotLoaded, match="version 1 are lost"):  # nobody has said at which factor
        await new.receiver.start(INITIAL)
    with pytest.raises(WeightsNotLoaded, match="version 1 are lost"):
        await stores[-1].set_capacity(0.75)
    assert await stores[-1].newer("serve/a", old.receiver.current, 0) is None
    await new.receiver.start(INITIAL)
    assert new.applied == [(changed, None)]
    assert new.receiver.current == changed
    assert (await stores[-1].describe())["lost"] is False
    assert (await stores[-1].set_capacity(0.75)).version == 2


@run
async def test_published_weights_that_were_lost_are_not_found_again_by_their_factor() -> None:
    memory, stores = Memory(), []
    stores.append(Store("key", memory))
    old = Replica(stores)
    await old.receiver.start(INITIAL)
    await stores[-1].announce(offer(1, weights(1)))
    await stores[-1].set_capacity(0.5)
    await stores[-1].acknowledgements(2, 5)
    stores.append(Store("key", memory))
    assert await stores[-1].newer("serve/a", old.receiver.current, 0) is None
    for _ in range(2):
        with pytest.raises(WeightsNotLoaded, match="version 2 are lost"):
            await Replica(stores, "serve/b").receiver.start(INITIAL)
    await stores[-1].announce(offer(3, weights(1)))
    await Replica(stores, "serve/b").receiver.start(INITIAL)


@run
async def test_the_copy_of_published_weights_is_also_that_of_their_other_factor() -> None:
    """A learner's object ends with its process: whatever is offered after `adopt` is the store's own."""
    for late in (False, True):  # the other factor comes before the copy is begun, or while it is made
        store, given = Store("key", Memory()), offer(1, weights(1))
        await store.register("serve/a", INITIAL)
        arrives: asyncio.Future[Weights] = asyncio.get_running_loop().create_future()
        await store.announce(Offer(given.weights, [arrives]))
        with mock.patch("ray.put", lambda value: ("copy", value)):
            adopting = asyncio.create_task(store.adopt(given.weights.digest))
            if late:
                await asyncio.sleep(0)
            await store.set_capacity(0.5)
            arrives.set_result(weights(1))
            await adopting
        found = await store.register("serve/b", INITIAL)
        assert found is not None
        assert found.weights == replace(given.weights, version=2, capacity_factor=0.5)
        assert found.where[0][0] == "copy"


def test_a_version_has_a_short_name() -> None:
    assert WeightVersion(3, "0f2a4c6e" * 4, "fp32").name == "v3-0f2a4c6e-fp32"
    assert WeightVersion(3, "0f2a4c6e" * 4, "bf16", 1.25).name == "v3-0f2a4c6e-bf16-cf1.25"
    assert isinstance(StaleWeights("x"), EscalaError)
