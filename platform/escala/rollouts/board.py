"""Where Serve's controller and the replicas leave each other notes: the cluster's key-value store, a few lines each.

The controller writes what there shall be and what was used (`service.ServiceRecord`), a replica what it can do and what
it cannot. Serve pickles what uses this module by value, so it has no records of its own.
"""

from __future__ import annotations

import json
from typing import Any

PREFIX = "escala/rollouts"


def write_service(application: str, record: dict[str, Any]) -> None:
    """What there is to know of an application's service now."""
    _put(f"{PREFIX}/{application}/service", record)


def read_service(application: str) -> dict[str, Any] | None:
    """What was written last; None where nothing was."""
    return _get(f"{PREFIX}/{application}/service")


def write_replica(application: str, replica: str, note: dict[str, Any] | None) -> None:
    """What one replica says of itself; None: it goes."""
    _put(f"{PREFIX}/{application}/replica/{replica}", note)


def read_replicas(application: str) -> dict[str, dict[str, Any]]:
    """What the replicas say of themselves, those that were killed included."""
    from ray.experimental.internal_kv import _internal_kv_list

    prefix = f"{PREFIX}/{application}/replica/"
    keys = [key.decode() for key in _internal_kv_list(prefix.encode())]
    found = {key.removeprefix(prefix): _get(key) for key in keys}
    return {name: note for name, note in found.items() if note is not None}


def _put(key: str, value: dict[str, Any] | None) -> None:
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    if value is None:
        _internal_kv_del(key.encode())
    else:
        _internal_kv_put(key.encode(), json.dumps(value).encode(), overwrite=True)


def _get(key: str) -> dict[str, Any] | None:
    from ray.experimental.internal_kv import _internal_kv_get

    text = _internal_kv_get(key.encode())
    found: dict[str, Any] | None = json.loads(text) if text else None
    return found
