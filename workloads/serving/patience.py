"""Calls to replicas that may die: asked again on another one."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayActorError, RayTaskError

from escala.errors import StateError
from workloads.serving.client import cause_of

ATTEMPTS = 4  # replicas that a request may lose
T = TypeVar("T")
log = logging.getLogger("ray.serve")  # it goes into the replica's log file


async def patient(call: Callable[[], Awaitable[T]]) -> T:
    """`call`, again where its replica died; a replica's own errors as they were raised there.

    Only for what may be done twice. Raises StateError after `ATTEMPTS` lost replicas.
    """
    for attempt in range(ATTEMPTS):
        try:
            return await call()
        except RayTaskError as error:
            raise cause_of(error) from None
        except RayActorError as error:
            if attempt == ATTEMPTS - 1:
                raise lost(error) from error
            log.warning(
                f"a replica died before its answer was complete: another one is asked ({type(error).__name__})"
            )
    raise AssertionError("unreachable")


def lost(error: RayActorError) -> StateError:
    """What a client is told whose replicas died."""
    return StateError(
        f"The replica died before its answer was complete ({type(error).__name__}).",
        "Ask again; `escala rollouts status` shows the replicas.",
    )
