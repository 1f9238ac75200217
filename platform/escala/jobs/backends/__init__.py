"""Where attempts run: the registry of backends. A cluster's file names its own (`backend`, default "ray")."""

from __future__ import annotations

from collections.abc import Callable

from escala.contract.errors import SpecError
from escala.jobs.backends.base import JobBackend
from escala.jobs.backends.ray import RayJobBackend
from escala.settings import Settings

BACKENDS: dict[str, Callable[[Settings], JobBackend]] = {"ray": RayJobBackend.of}


def open_backend(name: str, settings: Settings) -> JobBackend:
    """The backend of this name; connects to nothing yet. Raises SpecError for a name that is not registered."""
    if name not in BACKENDS:
        raise SpecError(
            f"there is no backend {name!r}", f"give one of {', '.join(BACKENDS)} in the cluster's file"
        )
    return BACKENDS[name](settings)
