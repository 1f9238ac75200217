"""The one HTTP client of the control plane: Ray's dashboard, Serve's REST interface, MLflow and the rollout service.

The standard library's urllib: these are small requests to our own servers, and `import requests` takes twice
as long. No proxy: a machine-wide http_proxy would carry requests for 127.0.0.1 away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HttpResponse:
    """What a server answered, whatever its status."""

    status: int
    body: bytes

    @property
    def succeeded(self) -> bool:
        """Whether the status is one of success."""
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        """The body, for people."""
        return self.body.decode(errors="replace").strip()

    def json(self) -> Any:
        """The body's JSON. Raises ValueError where it is none."""
        return json.loads(self.body)


def request(
    url: str,
    *,
    method: str = "GET",
    token: str | None = None,
    payload: Mapping[str, Any] | None = None,
    timeout_seconds: float,
) -> HttpResponse:
    """Ask once. Redirections are followed.

    Args:
        token: sent as a bearer token.
        payload: sent as JSON.
        timeout_seconds: for the connection, and for every read.

    Raises OSError where no answer comes: no connection, none in time, or what came is not HTTP.
    """
    from http.client import (
        HTTPException,  # 40 ms together with urllib.request, which `escala --help` does not need
    )
    from urllib.error import HTTPError
    from urllib.request import ProxyHandler, Request, build_opener

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if payload is not None:
        headers["Content-Type"] = "application/json"
    data = None if payload is None else json.dumps(payload).encode()
    asked = Request(url, data=data, headers=headers, method=method)
    try:
        try:
            with build_opener(ProxyHandler({})).open(asked, timeout=timeout_seconds) as response:
                return HttpResponse(response.status, response.read())
        except HTTPError as error:  # an answer as well
            with error:
                return HttpResponse(error.code, error.read())
    except HTTPException as error:
        raise OSError(f"{url} does not answer in HTTP: {error!r}") from error
