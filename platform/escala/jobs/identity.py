"""When two submissions are the same job: one idempotency key, and one spec, compared as canonical JSON."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from escala.contract.errors import SpecError
from escala.jobs.records import CHOSEN_TAG, OWN_KEY, RATES_TAG

ASKED = (
    "workload",
    "entry_point",
    "config",
    "name",
    "priority",
    "retries",
    "after",
    "max_flops",
    "max_seconds",
    "resume_from",
    "parent",
    "experiment",
    "tags",
)
"""What the spec of a job is made of: not the command as typed. `tags`: without the cluster's prices and the reasons of
what was chosen, which may change meanwhile; with the digest of the user's own modules.
"""


def own_key() -> str:
    """A key for a submission that was given none: its retries within the command are one job."""
    return OWN_KEY + secrets.token_hex(16)


def spec_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of what was asked for. `row`: the job's row, `after` and `parent` resolved.

    An `after` that is only there because the config builds on that job does not count: once the other job has ended,
    nobody waits for it, and a repeated try asks for the same all the same.
    """
    asked = {name: row[name] for name in ASKED}
    asked["tags"] = {key: row["tags"][key] for key in _asked_tags(row)}
    if asked["after"] in set(_built_on(asked["config"])):
        asked["after"] = None
    canonical = json.dumps(
        asked, sort_keys=True, separators=(",", ":")
    )  # as the database keeps it, NaN included
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_same(stored: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Raise SpecError where the key of `stored`, a job's row, comes again with the spec of `row`, which differs."""
    if stored["spec_hash"] == row["spec_hash"]:
        return
    different = next(iter(_differences(stored, row)), "")
    raise SpecError(
        f"the idempotency key {row['idempotency_key']!r} has queued job {stored['id']}, whose spec is another one"
        + (f": {different}" if different else ""),
        f"give another key for another job; `escala jobs show {stored['id']} --json` shows the job of this one",
    )


def _differences(stored: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    for name in ASKED:
        if name != "tags":
            yield from _compare(stored[name], row[name], name)
    for key in _asked_tags(stored) | _asked_tags(row):
        yield from _compare(stored["tags"].get(key), row["tags"].get(key), f"tags.{key}")


def _asked_tags(row: Mapping[str, Any]) -> set[str]:
    return {key for key in row["tags"] if key != RATES_TAG and not key.startswith(CHOSEN_TAG)}


def _compare(there: Any, here: Any, where: str) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _compare(there.get(key), here.get(key), f"{where}.{key}")
    elif there != here:
        yield f"{where} is {there!r} there and {here!r} here"


def _built_on(config: Any) -> Iterator[str]:
    """Ids of the jobs whose models a configuration starts from, wherever in it."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "job" and isinstance(value, str):
                yield value
            else:
                yield from _built_on(value)
    elif isinstance(config, list):
        for each in config:
            yield from _built_on(each)
