"""Checkpoints as they are written: names, manifests, and which of them a rule keeps. Standard library only.

A checkpoint is a folder `step-00000100` that holds `manifest.json` and the files that the manifest lists. Its manifest
says that it was finished, and the hashes, the manifest's own among them, say that it is still what was written. Nothing
in a manifest is trusted before its hash has been compared. `escala.storage` knows where checkpoints are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from escala.contract.sealed import check_entries, check_seal

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
PARTIAL = ".partial"
DAMAGED = ".damaged"  # and a random suffix: a refused checkpoint that made room for a new one of its step
TOKENIZER = "tokenizer"  # a folder beside the checkpoints of a job
_NAME = re.compile(r"step-([0-9]{8,})(\.partial|\.damaged-[0-9a-f]{8})?")


class OtherFormat(ValueError):
    """A manifest of a format that this version does not read."""


def checkpoint_name(step: int) -> str:
    """`step-00000100`: names sort as their steps do."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's directory (finished, partial or set aside); None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: {"sha256", "bytes"}. Raises OSError."""
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def is_finished(name: str) -> bool:
    """Whether a checkpoint of this name was finished, whatever has become of it."""
    return name == checkpoint_name(step_of(name) or 0)


def check_manifest(manifest: Mapping[str, Any], step: int) -> None:
    """Raise ValueError with the reason unless `manifest` is whole and is that of a checkpoint of `step`;
    OtherFormat for one of another format.
    """
    version = manifest.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise OtherFormat(f"{str(version)[:40]}; this version reads {FORMAT_VERSION} only")
    check_seal(manifest)
    check_entries(manifest.get("files"))
    if not manifest["files"] or MANIFEST in manifest["files"] or manifest.get("step") != step:
        raise ValueError("it does not belong to it")


def to_delete(names: Iterable[str], keep: int) -> list[str]:
    """Which directories of good and of partial checkpoints a rule frees: all good ones but the newest `keep`, and stale
    partial ones.

    A partial one is stale when a good one of its step or a later step exists; another may still be being written.
    """
    steps = {name: step for name in names if (step := step_of(name)) is not None and DAMAGED not in name}
    finished = sorted((n for n in steps if not n.endswith(PARTIAL)), key=lambda n: steps[n])
    newest = steps[finished[-1]] if finished else -1
    stale = [n for n in steps if n.endswith(PARTIAL) and steps[n] <= newest]
    return sorted(finished[: max(0, len(finished) - max(1, keep))] + stale)
