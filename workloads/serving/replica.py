"""What every replica does first and last: Serve's own ports on loopback, a place to run in, its name."""

from __future__ import annotations

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private.constants import SERVE_NAMESPACE  # the context's own says another one

from escala.contract.errors import StateError
from escala.rollouts.weights import actor_of
from escala.schema.serve import ServeConfig
from workloads.serving.loopback import keep_serve_on_loopback

PLACES = "places"
"""The deployment actor that holds the replicas' places (`workloads.serving.places`)."""


async def begin(config: ServeConfig) -> None:
    """In a replica's constructor, before it loads anything. Waits for its place."""
    keep_serve_on_loopback()
    if config.holds_places:
        await serve.get_deployment_actor(PLACES).take.remote(own_name())


async def end(config: ServeConfig) -> None:
    """When a replica leaves, its requests finished."""
    if not config.holds_places:
        return
    try:
        await serve.get_deployment_actor(PLACES).leave.remote(own_name())
    except (RayActorError, ValueError):
        return  # it went first, and the places with it


def own_name() -> str:
    """NAMESPACE/NAME of this replica's actor, by which `publish` finds out that it lives.

    Raises StateError where it is not found by it: it would count as dead, and its weights would not be waited for.
    """
    name = f"{SERVE_NAMESPACE}/{ray.get_runtime_context().get_actor_name()}"
    if actor_of(name) is None:
        raise StateError(
            f"This replica is not found as {name}.", "Ray Serve names its actors in another way now."
        )
    return name
