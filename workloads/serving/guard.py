"""What an HTTP request passes before anything of it is read, and what every answer of an error looks like.

A body is bounded before it is parsed, and must come in time. A web page may ask only from the service's own origin: a
browser would send another page's requests with this machine's rights.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from escala.contract.errors import EscalaError
from workloads.serving.openai import error_body
from workloads.serving.schemas import ErrorBody

BODY_BYTES = 16 << 20
BODY_SECONDS = 60.0
DEFAULT_PORTS = {"http": 80, "https": 443}
CLIENT_GONE = 499  # nginx's code; the client has left
log = logging.getLogger("ray.serve")


class Forbidden(EscalaError):
    """A request from a web page of another origin."""


class WrongType(EscalaError):
    """A body that is not declared as JSON."""


class TooLarge(EscalaError):
    """A body, or a text in it, beyond what is read."""


class TooSlow(EscalaError):
    """A body that did not come in time."""


STATUS = {
    "SpecError": 400,
    "DataError": 400,
    "Unauthorized": 401,
    "Forbidden": 403,
    "NotFoundError": 404,
    "TooSlow": 408,
    "StaleWeights": 409,
    "TooLarge": 413,
    "WrongType": 415,
    "RequestFailed": 500,
}
"""HTTP status of an error by its class; 503 for the others: nothing is wrong with the request."""


def check_origin(request: Request) -> None:
    """Raise Forbidden for a request that a browser sends for a page of another origin (RFC 6454; Fetch Metadata)."""
    host = request.headers.get("host", "")
    foreign = [origin for origin in request.headers.getlist("origin") if not _same(origin, host)]
    site = request.headers.get("sec-fetch-site", "none").lower()
    if foreign or site in ("cross-site", "same-site"):
        raise Forbidden(
            f"A web page of another origin ({', '.join(foreign)[:200] or site}) may not ask here.",
            "Ask from a program, or through a server of your own.",
        )


def _same(origin: str, host: str) -> bool:
    try:
        asks, here = urlsplit(origin), urlsplit(f"//{host}")
        port = here.port or DEFAULT_PORTS.get(asks.scheme)
        asking = (asks.hostname, asks.port or DEFAULT_PORTS.get(asks.scheme))
    except ValueError:
        return False
    return asks.scheme in DEFAULT_PORTS and asking == (here.hostname, port)


async def read_body(request: Request) -> bytes:
    """The JSON text of a request. Raises WrongType, TooLarge, TooSlow; ClientDisconnect where the client left."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise WrongType(
            f"The body's type is {kind[:100] or 'not given'}; JSON is read here.",
            "Send the header Content-Type: application/json.",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise WrongType("The body is compressed.", "Send it as it is.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > BODY_BYTES):
        raise _too_large()
    chunks, size = list[bytes](), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > BODY_BYTES:
                    raise _too_large()
                chunks.append(chunk)
    except TimeoutError as error:
        raise TooSlow(f"The body did not come within {BODY_SECONDS:g} s.", "Send it at once.") from error
    return b"".join(chunks)


def _too_large() -> TooLarge:
    return TooLarge(f"A body may have {BODY_BYTES >> 20} MiB.", "Send less at a time.")


def answer_json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """ASCII: half of a surrogate pair, in an error's words, is no UTF-8. Raises ValueError for NaN and infinity."""
    return Response(json.dumps(body, allow_nan=False), status, headers, "application/json")


def answer_error(error: Exception) -> Response:
    """In OpenAI's shape. An unexpected one is logged, and answered as an error of the service."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_GONE)
    return answer_json(describe(error), status_of(error))


def status_of(error: Exception) -> int:
    """The HTTP status of an error."""
    return STATUS.get(type(error).__name__, 503) if isinstance(error, EscalaError) else 500


def describe(error: Exception) -> ErrorBody:
    """OpenAI's error object."""
    if isinstance(error, EscalaError):
        return error_body(error.message, error.hint, type(error).__name__)
    log.error("a request ended with an unexpected error", exc_info=error)
    return error_body(
        f"The service failed: {type(error).__name__}.", "Its log has the traceback.", "InternalError"
    )
