"""Serve's own ports, which nothing here uses, on loopback.

Each replica opens a gRPC server for calls between deployments, on all interfaces and without authentication; it is
used only under RAY_SERVE_USE_GRPC_BY_DEFAULT=1. Ray has no setting that closes it or says where it listens.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private import replica
from ray.serve._private.constants import RAY_SERVE_USE_GRPC_BY_DEFAULT

EVERYWHERE = "[::]:"


def keep_serve_on_loopback() -> None:
    """In a replica's constructor, which runs before Serve opens the port: have it opened for this machine alone.

    Raises AttributeError where Serve opens it in another way: then another way is needed here.
    """
    opens = replica.add_port_to_grpc_server
    if RAY_SERVE_USE_GRPC_BY_DEFAULT or hasattr(opens, "on_loopback"):
        return

    def on_loopback(server: Any, address: str) -> int:
        return int(opens(server, address.replace(EVERYWHERE, "127.0.0.1:")))

    on_loopback.on_loopback = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = on_loopback
