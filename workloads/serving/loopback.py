"""Serve's own ports, which nothing here uses, on loopback.

Each replica opens a gRPC server for calls between deployments, on all interfaces and without authentication; it is
used only under RAY_SERVE_USE_GRPC_BY_DEFAULT=1. Ray has no setting that closes it or says where it listens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.serve._private import replica
from ray.serve._private.constants import RAY_SERVE_USE_GRPC_BY_DEFAULT

EVERYWHERE = "[::]:"


def keep_serve_on_loopback() -> None:
    """In a replica's constructor, which runs before Serve opens the port: have it opened for this machine alone.

    Raises AttributeError where Serve opens it in another way: then another way is needed here.
    """
    opens = replica.add_port_to_grpc_server
    if not RAY_SERVE_USE_GRPC_BY_DEFAULT and not isinstance(opens, OpenOnLoopback):
        replica.add_port_to_grpc_server = OpenOnLoopback(opens)


class OpenOnLoopback:
    """Ray's `add_port_to_grpc_server`, on 127.0.0.1 in the place of all interfaces."""

    def __init__(self, opens: Callable[[Any, str], int]) -> None:
        self._opens = opens

    def __call__(self, server: Any, address: str) -> int:
        """The port that was opened."""
        return self._opens(server, address.replace(EVERYWHERE, "127.0.0.1:"))
