"""Checkpoints as the control plane sees them: names, manifests, hashes and retention. Standard library only.

A checkpoint is a directory `step-00000100` that holds `manifest.json` and the files that it lists. It is
written under the name `step-00000100.partial` and renamed when all of it is there, so the name alone says
that it was finished, and the hashes say that it is still what was written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from escala.errors import CheckpointError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PARTIAL = ".partial"
TOKENIZER = "tokenizer"  # a directory beside the checkpoints of a job
_NAME = re.compile(r"step-(\d{8,})(\.partial)?")


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: where it is, and what its manifest says."""

    path: Path
    step: int  # optimiser steps done
    manifest: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that the manifest lists."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())


def checkpoint_name(step: int) -> str:
    """`step-00000100`: names sort as their steps do."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's directory name (finished or partial); None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in directory `path`, its files not yet checked. Raises CheckpointError, naming
    `path`.
    """
    step = step_of(path.name)
    if step is None or path.name.endswith(PARTIAL):
        raise CheckpointError(f"{path} is not a finished checkpoint", "a finished one is named step-NNNNNNNN")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, written_step, version = manifest["files"], manifest["step"], manifest["format_version"]
        whole = isinstance(files, dict) and all({"sha256", "bytes"} <= set(entry) for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} has no readable manifest: {error}") from error
    if not whole or written_step != step:
        raise CheckpointError(f"checkpoint {path} has a manifest that does not belong to it")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format {version}; this version reads {FORMAT_VERSION}",
            "use the version of escala that wrote it (its manifest names it)",
        )
    return Checkpoint(path, step, manifest)


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with its size and hash in the manifest. Raises CheckpointError naming the file."""
    for name, entry in checkpoint.manifest["files"].items():
        path = checkpoint.path / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {checkpoint.path} is partial: {name} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(
                f"checkpoint {checkpoint.path} is corrupt: {name} has {size} bytes, not {entry['bytes']}"
            )
        if file_sha256(path) != entry["sha256"]:
            raise CheckpointError(f"checkpoint {checkpoint.path} is corrupt: the hash of {name} differs")


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """The finished checkpoints in `directory` with readable manifests, oldest first. Files are not hashed."""
    found = []
    for path in _finished(directory):
        try:
            found.append(read_checkpoint(path))
        except CheckpointError:
            continue  # latest() names the ones that it refuses
    return found


def latest(directory: Path) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint in `directory` whose hashes are right, and why newer ones were refused.

    Returns None where there is no good one. Partial directories count as refused when they are newer.
    """
    refused: list[CheckpointError] = []
    newest_first = sorted(_entries(directory), key=lambda p: (step_of(p.name), p.name), reverse=True)
    for path in newest_first:
        try:
            checkpoint = read_checkpoint(path)
            verify(checkpoint)
        except CheckpointError as error:
            refused.append(error)
            continue
        return checkpoint, refused
    return None, refused


def to_delete(names: Iterable[str], keep: int) -> list[str]:
    """Which of the directory names retention frees: all finished ones but the newest `keep`, and stale
    partial ones.

    A partial one is stale when a finished one of its step or a later step exists; another may still be being
    written.
    """
    steps = {name: step for name in names if (step := step_of(name)) is not None}
    finished = sorted((n for n in steps if not n.endswith(PARTIAL)), key=lambda n: steps[n])
    newest = steps[finished[-1]] if finished else -1
    stale = [n for n in steps if n.endswith(PARTIAL) and steps[n] <= newest]
    return sorted(finished[: max(0, len(finished) - keep)] + stale)


def check_fits(checkpoint: Checkpoint, model: Mapping[str, Any], tokenizer_fingerprint: str) -> None:
    """Raise CheckpointError, naming the keys that differ, unless `checkpoint` is of this model and
    tokenizer. Whether workers share the experts is not the model's: checkpoints have them all.
    """
    theirs, model = _whole(checkpoint.manifest["config"]["model"]), _whole(model)
    differing = sorted(k for k in theirs.keys() | model.keys() if theirs.get(k) != model.get(k))
    if differing:
        pairs = ", ".join(f"{k}: {theirs.get(k)} there, {model.get(k)} here" for k in differing)
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is of another model ({pairs})",
            "set these model keys to the checkpoint's values, or start without it",
        )
    stored = checkpoint.manifest["fingerprints"]["tokenizer"]
    if stored != tokenizer_fingerprint:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} was trained with another tokenizer "
            f"({stored[:12]}, not {tokenizer_fingerprint[:12]})",
            "give the tokenizer.json of that job as data.tokenizer.path, or start without the checkpoint",
        )


def _whole(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model without how its experts lie on the workers."""
    moe = model.get("moe")
    return {**model, "moe": moe and {key: value for key, value in moe.items() if key != "expert_parallel"}}


def _entries(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [p for p in directory.iterdir() if p.is_dir() and step_of(p.name) is not None]


def _finished(directory: Path) -> list[Path]:
    return sorted(
        (p for p in _entries(directory) if not p.name.endswith(PARTIAL)), key=lambda p: step_of(p.name) or 0
    )
