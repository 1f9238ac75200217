"""An application that ends with its owner: with the process that started it for itself, however that process ends.

The owner holds a `Token`, an actor that Ray ends with it. The application's `api` replica asks for the token with
each health check, and has the application taken down where it is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve
from ray.serve._private.constants import SERVE_NAMESPACE  # the context's own says another one
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from escala.rollouts.weights import actor_of
from escala.schema.serve import OwnerConfig
from escala.storage.locks import locked

NAMESPACE = "escala"
ANYWHERE = PlacementGroupSchedulingStrategy(placement_group=None)
"""Outside of a sweep trial's placement group, which has no room for others and ends with the trial."""
log = logging.getLogger("ray.serve")


class Token:
    """Lives as long as who made it."""


@contextmanager
def owner(name: str, lock: Path) -> Iterator[OwnerConfig]:
    """This process as the owner of an application, until it leaves the context or ends.

    Args:
        name: no other owner's.
        lock: a file of the home's, the same for all who start or end Serve.
    """
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1}
    token = ray.remote(Token).options(**options, scheduling_strategy=ANYWHERE).remote()
    try:
        yield OwnerConfig(token=f"{NAMESPACE}/{name}", lock=str(lock))
    finally:
        ray.kill(token)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """While no other job of this home starts or ends Serve: one would end what another has just found running."""
    with locked(lock):
        yield


def remove(application: str) -> None:
    """Take an application down, if it is there; and Serve after the last one, so that the next may start it with HTTP.

    Call it `alone`.
    """
    if application in serve.status().applications:
        serve.delete(application)
    if not serve.status().applications:
        serve.shutdown()


def end_with_owner(of: OwnerConfig) -> None:
    """In a replica: have its application taken down where the owner is gone, by an actor that outlives the replica."""
    if actor_of(of.token) is not None:
        return
    application = serve.get_replica_context().app_name
    log.warning(f"{application}: its owner is gone, and so it goes")
    options = {"name": f"end-of-{application}", "namespace": NAMESPACE, "num_cpus": 0}
    end = ray.remote(End).options(**options, lifetime="detached", get_if_exists=True).remote()
    end.of.remote(application, f"{SERVE_NAMESPACE}/{ray.get_runtime_context().get_actor_name()}", of.lock)


class End:
    """Takes one application down, and ends."""

    def of(self, application: str, replica: str, lock: str) -> None:
        """`application`, unless another one of its name has come in its place: one without `replica`."""
        try:
            with alone(Path(lock)):
                if actor_of(replica) is not None:
                    remove(application)
        except Exception:
            log.exception(f"{application} was not taken down; its next health check tries again")
        ray.actor.exit_actor()
