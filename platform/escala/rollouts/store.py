"""The store actor of one deployment's weight versions, and of the kernels that all its replicas take.

Serve starts it beside the replicas, and again where it died.

A restarted store has lost the weights but not the number of the newest version, which lies in the cluster's
key-value store: it gives nobody older ones in their place, and says that they must be published again. Where the
newest version is of the weights that every replica is built with (another capacity factor, say), nothing is lost: once
a replica that serves it and one that starts have said so, the store goes on.

Every method runs on the actor's one event loop. Serve pickles this module by value, so it has no records of its own.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any, Protocol

from escala.contract.errors import DigestMismatch, SpecError, StaleWeights, StateError, WeightsNotLoaded
from escala.rollouts.weights import Acknowledgements, Offer, WeightVersion


class Marker(Protocol):
    """Remembers one number, whatever happens to this process."""

    def read(self) -> int:
        """The number last written; 0 before."""
        ...

    def write(self, version: int) -> None:
        """Remember `version`."""
        ...


class ClusterMarker:
    """In the cluster's key-value store (the head's), under a deployment's own key."""

    def __init__(self, key: str) -> None:
        self._key = f"escala/weights/{key}".encode()

    def read(self) -> int:
        """See Marker."""
        from ray.experimental.internal_kv import _internal_kv_get

        return int(_internal_kv_get(self._key) or 0)

    def write(self, version: int) -> None:
        """See Marker."""
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(self._key, str(version).encode(), overwrite=True)


class Store:
    """The newest version, and which replicas serve which.

    Args:
        key: of the deployment, another one each time that it is built.
        marker: where the newest version's number lies; None: in the cluster.
        has_owner: a job's, which alone makes versions, and counts them itself.
    """

    def __init__(self, key: str, marker: Marker | None = None, has_owner: bool = False) -> None:
        self._has_owner = has_owner
        self._marker = marker or ClusterMarker(key)
        self._newest = self._marker.read()
        self._lost = self._newest > 0
        self._offer: Offer | None = None
        self._initial: WeightVersion | None = None  # what replicas are built with
        self._served: WeightVersion | None = None  # the newest, as a replica that serves it has said
        self._kernels: str | None = None
        self._replicas: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._changed = asyncio.Event()

    async def register(self, replica: str, holds: WeightVersion) -> Offer | None:
        """A replica reports for duty with the weights that it was built with. The published ones, if there are.

        Raises WeightsNotLoaded where published ones are lost, DigestMismatch where `holds` differ from the other
        replicas' initial ones.
        """
        self._check_initial(replica, holds)
        self._hear(holds)
        self._check_there(f"{replica} may not serve older ones")
        self._replicas[replica] = holds.version
        return self._offer

    async def newer(self, replica: str, holds: WeightVersion, seconds: float) -> Offer | None:
        """A version above `holds`, as soon as there is one; None after `seconds`.

        A store that has never heard of the replica (a restarted one) knows it from here on.
        """
        self._replicas.setdefault(replica, holds.version)
        self._kernels = self._kernels or holds.kernels
        self._hear(holds)
        if holds.version > self._newest:
            raise StaleWeights(f"{replica} serves version {holds.version}, and {self._newest} is the newest.")
        await self._until(
            lambda: self._offer is not None and self._offer.weights.version > holds.version, seconds
        )
        offer = self._offer
        return offer if offer is not None and offer.weights.version > holds.version else None

    async def kernels(self) -> str | None:
        """Which kernels the replicas multiply with; None: no replica has chosen yet."""
        return self._kernels

    async def agree_on_kernels(self, kernels: str) -> str:
        """A replica has chosen `kernels`. What all shall take: the first choice that came here."""
        self._kernels = self._kernels or kernels
        return self._kernels

    async def announce(self, offer: Offer) -> None:
        """A learner's new version. Raises StaleWeights unless it is above the newest."""
        version = offer.weights.version
        if version <= self._newest:
            raise StaleWeights(
                f"Version {version} is published, and {self._newest} is the newest: versions only grow.",
                f"Give {self._newest + 1} or more.",
            )
        self._marker.write(
            version
        )  # first: a store that dies between the two refuses, and serves nothing old
        self._newest, self._offer, self._lost = version, offer, False
        self._refused.clear()
        self._change()

    async def set_capacity(self, factor: float | None) -> WeightVersion:
        """Serve the newest weights at another capacity factor (docs/theory B.5), as the next version; None: nothing is
        dropped. That version, or the newest one where it has this factor.

        Whether replicas can serve it, the store does not know: ask `Policy.set_capacity`.

        Raises SpecError for a number that is no factor, StateError where a job owns the service, WeightsNotLoaded where
        the newest weights are lost, or no replica has come yet.
        """
        if factor is not None and not (math.isfinite(factor) and factor > 0):
            raise SpecError(f"Capacity factor {factor} is out of range.", "Give a number above 0, or none.")
        if self._has_owner:
            raise StateError(
                "The capacity factor of a job's own service stays: only the job makes its versions.",
                "Change it on a service that no job owns.",
            )
        self._check_there("they cannot be served at another capacity factor")
        newest = self._offer.weights if self._offer is not None else self._initial
        if newest is None:
            raise WeightsNotLoaded(
                "No replica has come yet, whose weights these are.", "Ask again in a while."
            )
        if newest.capacity_factor == factor:
            return newest
        where = [] if self._offer is None else self._offer.where
        version = replace(newest, version=self._newest + 1, capacity_factor=factor)
        await self.announce(Offer(version, where))
        return version

    async def adopt(self, digest: str) -> None:
        """Copy these weights into an object of this actor's: a learner's objects end with its process."""
        import ray

        if self._offer is None or self._offer.weights.digest != digest:
            return  # newer ones are here already
        weights = await self._offer.where[0]
        copy = await asyncio.to_thread(ray.put, weights)
        if self._offer.weights.digest == digest:
            self._offer = Offer(self._offer.weights, [copy])

    async def acknowledge(self, replica: str, version: int) -> None:
        """A replica serves `version` from now on."""
        self._replicas[replica] = version
        self._change()

    async def refuse(self, replica: str, version: int, why: str) -> None:
        """A replica cannot take `version`."""
        if version == self._newest:
            self._refused[replica] = why
        self._change()

    async def forget(self, replica: str) -> None:
        """A replica is gone."""
        self._replicas.pop(replica, None)
        self._change()

    async def acknowledgements(self, version: int, seconds: float) -> Acknowledgements:
        """How far `version` has come, at the latest after `seconds`, sooner when no replica is missing."""

        def missing() -> list[str]:
            behind = [name for name, serves in self._replicas.items() if serves < version]
            return [name for name in behind if name not in self._refused]

        await self._until(lambda: not missing(), seconds)
        done = tuple(sorted(name for name, serves in self._replicas.items() if serves >= version))
        return Acknowledgements(done, tuple(sorted(missing())), dict(self._refused))

    async def newest(self) -> int:
        """The newest version's number, its weights lost or not."""
        return self._newest

    async def describe(self) -> dict[str, Any]:
        """For people: the newest version, whether it can still be had, and what each replica serves."""
        name = self._offer.weights.name if self._offer else None
        return {
            "newest": self._newest,
            "name": name,
            "lost": self._lost,
            "replicas": dict(self._replicas),
            "kernels": self._kernels,
        }

    def _check_initial(self, replica: str, holds: WeightVersion) -> None:
        if holds.version:
            return
        self._initial = self._initial or holds
        if holds.digest != self._initial.digest:
            raise DigestMismatch(
                f"{replica} was built from weights with the digest {holds.digest}, the others with "
                f"{self._initial.digest}.",
                "Give every node the same model files.",
            )

    def _check_there(self, so: str) -> None:
        """Raise WeightsNotLoaded where the newest version's weights are lost; `so`: what follows from it."""
        if self._lost:
            raise WeightsNotLoaded(
                f"The weights of version {self._newest} are lost with the store that held them, and {so}.",
                "Publish them again under a newer version, or take the deployment down and up.",
            )

    def _hear(self, holds: WeightVersion) -> None:
        """What a replica says that it holds: after a restart it may be what the store before this one has known."""
        if not holds.version:
            self._initial = self._initial or holds
        if not self._lost:
            return
        if holds.version == self._newest:
            self._served = holds
        if self._served and self._initial and self._served.digest == self._initial.digest:
            self._offer, self._lost = Offer(self._served, []), False
            self._change()

    async def _until(self, condition: Any, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            return

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
