"""Who may ask over HTTP: whoever has the token; without one, this machine."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress

from fastapi import Request

from escala.contract.errors import EscalaError


class Unauthorized(EscalaError):
    """No token, a wrong one, or a request from another machine to a service without one."""


def authorise(request: Request, token_sha256: str | None) -> None:
    """Raise Unauthorized unless `request` carries the bearer token of this hash; None: unless it is of this machine."""
    if token_sha256 is None:
        if not is_local(request):
            raise Unauthorized(
                "This service has no token, and answers requests of its own machine only.",
                "Set ESCALA_ROLLOUTS_TOKEN and start it again.",
            )
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(hashlib.sha256(given.encode()).hexdigest(), token_sha256):
        raise Unauthorized("The bearer token is missing or wrong.", "Send ESCALA_ROLLOUTS_TOKEN's value.")


def is_local(request: Request) -> bool:
    """Whether a request came over loopback and to a loopback name (so that no web page can send it elsewhere's)."""
    ends = [request.scope.get("client"), request.scope.get("server")]
    hosts = [end[0] for end in ends if end] + [request.url.hostname or ""]
    return len(hosts) == 3 and all(is_loopback(host) for host in hosts)


def is_loopback(host: str) -> bool:
    """Whether `host` means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
