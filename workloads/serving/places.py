"""The CPUs of a deployment's replicas, held beside them, so that a dead replica's place stays its successor's.

Ray gives a dead actor's CPUs at once to whoever waits for them, a job for instance, and Serve starts another replica
seconds later. So on a cluster of one node, where it does not matter which node a place is on, replicas reserve nothing
themselves: this actor holds a placement group for each, which ends with this actor, and this actor with its deployment.

Serve pickles this module by value, so it has no records of its own.
"""

from __future__ import annotations

import asyncio
from typing import Any

from escala.rollouts.weights import actor_of

TIDY_SECONDS = 120.0  # a free place is removed after this long, at most twice this long
WAIT_SECONDS = 1 << 30


class Places:
    """Serve starts it beside the replicas.

    Args:
        cpus: of one place.
    """

    def __init__(self, cpus: float) -> None:
        self._cpus = cpus
        self._groups: dict[str, Any] = {}  # by the replica's name
        self._dead: set[str] = set()
        self._turn = asyncio.Lock()
        self._tidying: asyncio.Task[None] | None = None

    async def take(self, replica: str) -> None:
        """A place for `replica` (NAMESPACE/NAME): a dead one's, or a new one, waited for. Its own, where it has one."""
        from ray.util import placement_group

        self._tidying = self._tidying or asyncio.create_task(self._tidy())
        async with self._turn:
            if replica not in self._groups:
                left = await self._left_behind()
                group = self._groups.pop(left[0]) if left else placement_group([{"CPU": self._cpus}])
                self._groups[replica] = group
        await asyncio.to_thread(self._groups[replica].wait, WAIT_SECONDS)

    async def leave(self, replica: str) -> None:
        """A replica is gone for good: its place is anybody's."""
        from ray.util import remove_placement_group

        group = self._groups.pop(replica, None)
        if group is not None:
            await asyncio.to_thread(remove_placement_group, group)

    async def _left_behind(self) -> list[str]:
        names = list(self._groups)
        found = [await asyncio.to_thread(actor_of, name) for name in names]
        return [
            name for name, actor in zip(names, found, strict=True) if actor is None and name in self._groups
        ]

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            async with self._turn:
                left = await self._left_behind()
                for name in self._dead.intersection(left):
                    await self.leave(name)
                self._dead = set(left)
