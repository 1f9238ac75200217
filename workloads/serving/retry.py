"""Calls to replicas that may die: asked again on another one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from escala.contract.errors import StateError
from workloads.generation.protocol import EngineStopped
from workloads.serving.client import cause_of

ATTEMPTS = 4  # replicas that a request may lose
PAUSE_SECONDS = (1.0, 3.0, 6.0)
"""After a replica whose engine has stopped: it refuses at once, and gets requests until Serve has replaced it (three
health checks, `HEALTH_SECONDS` apart)."""
T = TypeVar("T")
log = logging.getLogger("ray.serve")  # it goes into the replica's log file


async def retry(call: Callable[[], Awaitable[T]]) -> T:
    """`call`, again where its replica or its engine died; a replica's own errors as they were raised there.

    Only for what may be done twice. Raises StateError after `ATTEMPTS` lost replicas, or where there is none to ask.
    """
    for attempt in range(ATTEMPTS):
        try:
            return await call()
        except (RayTaskError, RayActorError, BackPressureError, DeploymentUnavailableError) as error:
            await again_or_raise(error, attempt)
    raise AssertionError("unreachable")


async def again_or_raise(error: Exception, attempt: int) -> None:
    """After a failed attempt (0, 1, ...): return, after a pause, where another replica may be asked; else raise why."""
    cause = cause_of(error) if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayActorError):
        cause = lost(cause)
    elif isinstance(cause, (BackPressureError, DeploymentUnavailableError)):
        raise StateError(f"No replica takes this request: {cause}", "Ask again later.") from error
    elif not isinstance(cause, EngineStopped):
        raise cause from None
    if attempt == ATTEMPTS - 1:
        raise cause from error
    log.warning(f"another replica is asked: {cause.message}")
    if isinstance(cause, EngineStopped):
        await asyncio.sleep(PAUSE_SECONDS[attempt])


async def all_of(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, in order. Where one fails, or the caller is cancelled, the others are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def lost(error: RayActorError) -> StateError:
    """What a client is told whose replicas died."""
    return StateError(
        f"The replica died before its answer was complete ({type(error).__name__}).",
        "Ask again; `escala rollouts status` shows the replicas.",
    )
