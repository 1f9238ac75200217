"""The contract on weight versions: what is published, what a replica must show, and what a request may ask for.

A learner publishes version v (`publish`): the digest is computed once, the bytes go into the object store once, and
the store actor (`store.py`) announces them. Every replica (`Receiver`) waits for newer versions, pulls at start-up
before it serves, verifies the digest, loads, acknowledges. A replica that does not acknowledge in time is killed,
for its deployment to replace it, and named. Versions only grow: 0 is what the deployment was started with.

A version may also be the same weights at another capacity factor (`Store.set_capacity`): a replica that has them
fetches none.

State dicts are opaque here: names, dtypes, shapes, and buffers of bytes (`workloads/serving/weights.py` makes them).
The digest finds damage and mix-ups, not attackers: XXH3, 128 bits, at 30 GB/s where BLAKE2b does 1.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import xxhash

from escala.contract.errors import DigestMismatch, EscalaError, StaleWeights, WeightsNotLoaded

POLL_SECONDS = 1.0  # how soon a dead replica is noticed while others still load
WATCH_SECONDS = 20.0  # a wait for news ends, and begins again: a store that died is noticed


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's name, dtype ("float32", "bfloat16", ...) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """A state dict as plain bytes.

    Attributes:
        entries: one for each tensor.
        buffers: of each tensor, its contiguous bytes (arrays of uint8: the object store shares them uncopied).
    """

    entries: tuple[TensorEntry, ...]
    buffers: tuple[Any, ...]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(memoryview(buffer).nbytes for buffer in self.buffers)


@dataclass(frozen=True)
class WeightVersion:
    """Which weights a response is from.

    Args:
        version: 0 for those that a deployment started with; published ones count up, gaps allowed.
        digest: of `digest_of`.
        precision: that they are served in ("fp32", "bf16", "int8", ...).
        capacity_factor: of a mixture of experts that drops tokens in generation (docs/theory B.5); None: dropless,
            or dense.
        kernels: that multiply by them, `form=rows/tiles;...`, on which the last bits depend (docs/theory A.9); None:
            whoever published did not ask, and the service's own do.
    """

    version: int
    digest: str
    precision: str
    capacity_factor: float | None = None
    kernels: str | None = None

    @property
    def name(self) -> str:
        """Short, for headers and logs: v3-0f2a4c6e-fp32."""
        capacity = "" if self.capacity_factor is None else f"-cf{self.capacity_factor:g}"
        return f"v{self.version}-{self.digest[:8]}-{self.precision}{capacity}"


@dataclass(frozen=True)
class Offer:
    """A version and where its `Weights` lie: a list of one ObjectRef (in a list, Ray passes it on unresolved), or an
    empty one: these are the weights that the replicas were built with, and nobody has published them.
    """

    weights: WeightVersion
    where: list[Any]


@dataclass(frozen=True)
class Acknowledgements:
    """How far a version has come: replicas that serve it, that have not answered yet, and that refused, with why."""

    acknowledged: tuple[str, ...]
    missing: tuple[str, ...]
    refused: dict[str, str]


@dataclass(frozen=True)
class Published:
    """A version that every replica serves, which they are, its size, and how long that took."""

    weights: WeightVersion
    replicas: tuple[str, ...]
    bytes: int
    seconds: float


def digest_of(weights: Weights) -> str:
    """XXH3-128 over names, dtypes, shapes and bytes, 32 hex digits. The order of the tensors counts."""
    hasher = xxhash.xxh3_128()
    hasher.update(json.dumps([[e.name, e.dtype, *e.shape] for e in weights.entries]).encode())
    for buffer in weights.buffers:
        hasher.update(buffer)
    return hasher.hexdigest()


def verify(weights: Weights, offered: WeightVersion) -> None:
    """Raise DigestMismatch unless `weights` are the offered ones."""
    found = digest_of(weights)
    if found != offered.digest:
        raise DigestMismatch(
            f"The weights of version {offered.version} have the digest {found}, not {offered.digest}.",
            "Publish them again under a newer version.",
        )


def publish(
    store: Any,
    weights: Weights,
    version: int,
    *,
    precision: str,
    capacity_factor: float | None = None,
    kernels: str | None = None,
    timeout_seconds: float = 120.0,
) -> Published:
    """Make `weights` the version that every replica serves; returns when all that live have acknowledged.

    Args:
        store: the deployment's store actor: its replicas' `weights_store` method gives it.
        version: above every one published before.
        timeout_seconds: within which a replica must acknowledge, what it is generating finished first.

    Raises StaleWeights where `version` is not newer (nothing has changed then). Raises DigestMismatch or
    WeightsNotLoaded, naming the replicas, where some refused the weights or were replaced for their silence: the
    version stands, and whatever replaces those replicas starts with it.
    """
    import ray

    started = time.monotonic()
    identity = WeightVersion(version, digest_of(weights), precision, capacity_factor, kernels)
    ray.get(store.announce.remote(Offer(identity, [ray.put(weights)])), timeout=timeout_seconds)
    adopted = store.adopt.remote(
        identity.digest
    )  # the copy that outlives this process, made while the replicas load
    replicas = _wait(store, version, started + timeout_seconds)
    ray.get(adopted)
    for name in replicas.missing:
        replace(store, name)
    _complain(version, replicas, timeout_seconds)
    return Published(identity, replicas.acknowledged, weights.bytes, time.monotonic() - started)


def _wait(store: Any, version: int, deadline: float) -> Acknowledgements:
    """Until no live replica is missing, or the deadline."""
    import ray

    while True:
        left = max(0.0, deadline - time.monotonic())
        replicas: Acknowledgements = ray.get(store.acknowledgements.remote(version, min(POLL_SECONDS, left)))
        if not replicas.missing or not left:
            return replicas
        for name in replicas.missing:
            if actor_of(name) is None:
                ray.get(store.forget.remote(name))


def _complain(version: int, replicas: Acknowledgements, seconds: float) -> None:
    if replicas.refused:
        names = "; ".join(f"{name}: {why}" for name, why in sorted(replicas.refused.items()))
        kind = DigestMismatch if "DigestMismatch" in names else WeightsNotLoaded
        raise kind(f"Replicas refused version {version}: {names}", "Publish good weights as a newer version.")
    if replicas.missing:
        raise WeightsNotLoaded(
            f"Replicas did not acknowledge version {version} within {seconds:g} s and were replaced: "
            f"{', '.join(replicas.missing)}.",
            "Their successors start with this version; give more time if responses are long.",
        )


def actor_of(name: str) -> Any:
    """The live actor of a replica's name, NAMESPACE/NAME; None where there is none any more."""
    import ray

    namespace, _, actor = name.partition("/")
    try:
        return ray.get_actor(actor, namespace=namespace)
    except ValueError:
        return None


def replace(store: Any, name: str) -> None:
    """Kill a replica: its deployment's controller starts another one, which pulls at start-up."""
    import ray

    if (actor := actor_of(name)) is not None:
        ray.kill(actor, no_restart=True)
    ray.get(store.forget.remote(name))


class Receiver:
    """A replica's side: knows its version, follows the store's, and answers for every request's bound.

    Args:
        find_store: the store actor's handle, looked up again after it died.
        name: NAMESPACE/NAME of the replica's actor.
        apply: loads verified weights; it returns when every later response is of them. None: the weights are those
            that it has, and only the rest of the version is new. Its EscalaErrors are refusals.
        wait_seconds: how long a request waits for a version that is announced and not loaded yet.
    """

    def __init__(
        self,
        find_store: Callable[[], Any],
        name: str,
        apply: Callable[[WeightVersion, Weights | None], Awaitable[None]],
        wait_seconds: float = 120.0,
    ) -> None:
        self.failure: EscalaError | None = None
        self._find_store, self._name, self._apply, self._wait_seconds = find_store, name, apply, wait_seconds
        self._current: WeightVersion | None = None
        self._digest: str | None = None  # of the weights that it has
        self._moved = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    @property
    def current(self) -> WeightVersion:
        """What is served now. Raises WeightsNotLoaded before `start`, and the failure that ended the following."""
        if self.failure is not None:
            raise self.failure
        if self._current is None:
            raise WeightsNotLoaded("This replica has no weights yet.", "Ask again when it is ready.")
        return self._current

    async def start(self, initial: WeightVersion) -> None:
        """Register with the weights that the replica was built with, take the published ones, follow from there.

        Raises WeightsNotLoaded where newer ones were published and are lost, DigestMismatch where `initial` are not
        the other replicas', or the published ones are damaged.
        """
        store, self._digest = self._find_store(), initial.digest
        offer = await store.register.remote(self._name, initial)
        if offer is None:
            self._current = initial
        else:
            await self._take(store, offer)
        self._watch = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Follow no more; the store need not wait for this replica."""
        if self._watch is not None:
            self._watch.cancel()
        try:
            await self._find_store().forget.remote(self._name)
        except self._gone():
            return  # the store is gone, too

    async def require(self, min_version: int = 0, max_staleness: int | None = None) -> WeightVersion:
        """What a request may run on: at least `min_version`, at most `max_staleness` versions behind the newest.

        Waits for a version that has been announced. Raises StaleWeights where the bound cannot be kept, or not be
        known: the store does not answer.
        """
        current = self.current
        if max_staleness is None and current.version >= min_version:
            return current
        newest = await self._newest()
        wanted = min_version if max_staleness is None else max(min_version, newest - max_staleness)
        if newest < wanted:
            raise StaleWeights(
                f"Version {wanted} is asked for, and the newest is {newest}.",
                "Publish it first, or ask for less.",
            )
        deadline = time.monotonic() + self._wait_seconds
        while self.current.version < wanted:
            try:
                await asyncio.wait_for(self._moved.wait(), deadline - time.monotonic())
            except TimeoutError:
                raise StaleWeights(
                    f"Version {wanted} is asked for, and {self.current.version} is still served after "
                    f"{self._wait_seconds:g} s.",
                    "Ask again; `escala rollouts status` shows the replicas.",
                ) from None
        return self.current

    async def _newest(self) -> int:
        try:
            return int(await self._find_store().newest.remote())
        except self._gone() as error:
            raise StaleWeights(
                "The store of weight versions does not answer, so that nobody knows how old these are.",
                "Ask again in a few seconds, or without max_staleness.",
            ) from error

    async def _follow(self) -> None:
        """Take every newer version, until one is refused: from then on the replica answers nothing."""
        while True:
            try:
                store = self._find_store()
                offer = await store.newer.remote(self._name, self.current, WATCH_SECONDS)
                if offer is not None:
                    await self._take(store, offer)
            except EscalaError as error:
                self.failure = error
                self._announce_move()
                return
            except self._gone():
                await asyncio.sleep(POLL_SECONDS)  # its deployment starts another store

    async def _take(self, store: Any, offer: Offer) -> None:
        try:
            await self._apply(offer.weights, await self._weights_of(offer))
        except EscalaError as error:
            why = f"{type(error).__name__}: {error.message}"
            await store.refuse.remote(self._name, offer.weights.version, why)
            raise
        self._current, self._digest = offer.weights, offer.weights.digest
        self._announce_move()
        await store.acknowledge.remote(self._name, offer.weights.version)

    async def _weights_of(self, offer: Offer) -> Weights | None:
        """Those of an offer, verified; None: the replica has them."""
        if offer.weights.digest == self._digest:
            return None
        if not offer.where:
            raise WeightsNotLoaded(
                f"Version {offer.weights.version} is of the weights {offer.weights.digest} that replicas were built "
                f"with, and this one has {self._digest}.",
                "Publish weights under a newer version.",
            )
        weights = await self._fetch(offer)
        await asyncio.to_thread(verify, weights, offer.weights)
        return weights

    async def _fetch(self, offer: Offer) -> Weights:
        import ray

        try:
            weights: Weights = await offer.where[0]
        except ray.exceptions.RayError as error:
            raise WeightsNotLoaded(
                f"The weights of version {offer.weights.version} are gone from the object store: {error}",
                "Publish them again under a newer version.",
            ) from error
        return weights

    def _announce_move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    @staticmethod
    def _gone() -> tuple[type[Exception], ...]:
        """What calls to a store raise that is dead, dying or not there yet."""
        import ray

        return (ray.exceptions.RayActorError, ValueError)
