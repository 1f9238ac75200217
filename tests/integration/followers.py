"""Who takes part in a publication, as actors. A module of their own, since each process imports it: without torch."""

from __future__ import annotations

import asyncio
from typing import Any

from escala.rollouts.weights import Receiver, WeightVersion, publish


class Follower:
    """A replica without Serve: an actor with a receiver."""

    async def start(self, store: Any, name: str, digest: str, hangs: bool) -> None:
        async def apply(version: Any, weights: Any) -> None:
            await asyncio.sleep(3600 if hangs else 0)

        self.receiver = Receiver(lambda: store, f"followers/{name}", apply)
        await self.receiver.start(WeightVersion(0, digest, "fp32"))

    async def version(self) -> int:
        return self.receiver.current.version


class Learner:
    """Publishes from a process of its own."""

    def publish(self, store: Any, seed: int, version: int, seconds: float) -> tuple[str, ...]:
        import torch

        from workloads.serving.weights import pack

        packed = pack({"w": torch.full((1000,), float(seed))})
        return publish(store, packed, version, precision="fp32", timeout_seconds=seconds).replicas
