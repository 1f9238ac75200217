"""A replica's side of the governor: what it measured, and the targets that it obeys (`escala.rollouts.serve_hook`).

Targets come from the board, once a second. What the machine does not let it set is refused by name, and the replica
goes on without it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve

from escala.contract.errors import EscalaError
from escala.rollouts import board
from escala.schema import ModelConfig
from escala.schema.serve import ServeConfig
from workloads.serving.energy import ReplicaEnergy, counter_of
from workloads.serving.latency import Latencies
from workloads.serving.power import PowerActuator, find_actuator
from workloads.serving.stepper import Stepper

log = logging.getLogger(__name__)
NOT_KNOWN = -1.0
WINDOW_SECONDS = 5.0  # of latencies without a governor


class GovernedReplica:
    """What one replica measures and obeys.

    Args:
        set_capacity: asks the store of weight versions for a version with this capacity factor.

    Attributes:
        latencies: of its requests.
    """

    def __init__(
        self,
        config: ServeConfig,
        model: ModelConfig,
        stepper: Stepper,
        set_capacity: Callable[[float], Awaitable[Any]],
    ) -> None:
        governor, on_gpu = config.governor, config.replica_gpus > 0
        self._context = serve.get_replica_context()
        self._stepper, self._set_capacity = stepper, set_capacity
        self.latencies = Latencies(WINDOW_SECONDS if governor is None else governor.window_seconds)
        self._energy = ReplicaEnergy(config.cluster_rates, model, lambda: counter_of(on_gpu))
        self._started = time.monotonic()
        self._says = {"energy": self._energy.source, "power": "not asked for"}
        self._power: PowerActuator | None = None
        asked = governor is not None and bool(governor.power_shares)
        if asked:
            self._power, self._says["power"] = find_actuator(on_gpu)
        self._refused = {"power": asked and self._power is None, "capacity factor": False}
        self._obeyed: dict[str, float] = {}
        self._joules: float | None = None

    def figures(self) -> dict[str, float]:
        """What Serve's controller reads (`escala.rollouts.serve_hook.READINGS`)."""
        stats = self._stepper.stats
        joules = self._joules = self._energy.read(stats, time.monotonic() - self._started)
        return {
            "latency_seconds": _number(self.latencies.response_seconds),
            "ttft_seconds": _number(self.latencies.first_token_seconds),
            "generation_seconds": _number(self.latencies.generation_seconds),
            "joules": _number(joules),
            "counted": float(self._energy.counted),
            "tokens": float(stats.prompt_tokens + stats.generated_tokens),
            "power_refused": float(self._refused["power"]),
            "capacity_refused": float(self._refused["capacity factor"]),
        }

    async def obey(self) -> None:
        """Take the targets that stand on the board, and say there what this replica can and cannot. What fails for
        another reason than that the machine or the service refuses it is tried again the next time.
        """
        record = await asyncio.to_thread(board.read_service, self._context.app_name)
        targets = (record or {}).get("targets") or {}
        if self._is_new(targets, "batch_limit"):
            await self._stepper.limit_running(int(targets["batch_limit"]))
            self._obeyed["batch_limit"] = targets["batch_limit"]
        if self._power is not None and self._is_new(targets, "power_share"):
            await self._try("power", asyncio.to_thread(self._power.set, targets["power_share"]))
            self._obeyed["power_share"] = targets["power_share"]
        if self._is_new(targets, "capacity_factor"):
            await self._try("capacity factor", self._set_capacity(targets["capacity_factor"]))
            self._obeyed["capacity_factor"] = targets["capacity_factor"]
        note = {**self._says, "targets": self._obeyed, "joules": self._joules}
        await asyncio.to_thread(board.write_replica, self._context.app_name, self._context.replica_tag, note)

    async def leave(self) -> None:
        """The replica goes: its device as it was, its note away."""
        if self._power is not None and "power_share" in self._obeyed:
            await self._try("power", asyncio.to_thread(self._power.restore))
        await asyncio.to_thread(board.write_replica, self._context.app_name, self._context.replica_tag, None)

    def _is_new(self, targets: dict[str, Any], name: str) -> bool:
        return targets.get(name) is not None and self._obeyed.get(name) != targets[name]

    async def _try(self, actuator: str, action: Awaitable[Any]) -> None:
        try:
            await action
        except (OSError, EscalaError) as error:
            log.warning("%s: refused: %s", actuator, error)
            self._refused[actuator] = True
            self._says[actuator] = f"refused: {error}"


def _number(value: float | None) -> float:
    return NOT_KNOWN if value is None else value
