"""Checkpoints as the control plane sees them: names, manifests, hashes and retention. Standard library only.

A checkpoint is a directory `step-00000100` that holds `manifest.json` and the files that it lists. It is
written under the name `step-00000100.partial` and renamed when all of it is there, so the name alone says
that it was finished, and the hashes, the manifest's own among them, say that it is still what was written.
Nothing in a manifest is trusted before its hash has been compared.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from escala.contract.errors import CheckpointError
from escala.contract.sealed import check_entries, check_file, check_seal, read_json_object

T = TypeVar("T")
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
PARTIAL = ".partial"
DAMAGED = ".damaged"  # and a random suffix: a refused checkpoint that made room for a new one of its step
TOKENIZER = "tokenizer"  # a directory beside the checkpoints of a job
_NAME = re.compile(r"step-([0-9]{8,})(\.partial|\.damaged-[0-9a-f]{8})?")
NOT_FINISHED = "a finished one is named step-NNNNNNNN"
REWRITE = "an older one is used where there is one; delete this directory when you do not need it"


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

    def part(self, where: str, kind: type[T]) -> T:
        """What the manifest says at a dotted path. Raises CheckpointError where it says nothing of that type."""
        found: Any = self.manifest
        for key in where.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise CheckpointError(f"checkpoint {self.path} has no usable {where!r} in its manifest", REWRITE)
        return found


@dataclass(frozen=True)
class Retention:
    """What a retention rule makes of a directory of checkpoints."""

    delete: list[str] = field(default_factory=list)  # names: good ones beyond the rule, stale partial ones
    damaged: list[CheckpointError] = field(
        default_factory=list
    )  # finished ones that cannot be used: left alone


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


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in directory `path`: its manifest is whole, its files are not yet checked. Raises
    CheckpointError, naming `path`.
    """
    step = step_of(path.name)
    if step is None or path.name != checkpoint_name(step):
        raise CheckpointError(f"{path} is not a finished checkpoint", NOT_FINISHED)
    try:
        manifest = read_json_object(path / MANIFEST)
        version = manifest.get("format_version")
        if version == FORMAT_VERSION and not isinstance(version, bool):
            check_seal(manifest)
            check_entries(manifest.get("files"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} has no usable manifest: {error}", REWRITE) from error
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise _other_format(path, manifest)
    if not manifest["files"] or MANIFEST in manifest["files"] or manifest.get("step") != step:
        raise CheckpointError(f"checkpoint {path} has a manifest that does not belong to it", REWRITE)
    return Checkpoint(path, step, manifest)


def _other_format(path: Path, manifest: Mapping[str, Any]) -> CheckpointError:
    versions = manifest.get("versions")
    writer = versions.get("escala") if isinstance(versions, dict) else None
    return CheckpointError(
        f"checkpoint {path} has format {str(manifest.get('format_version'))[:40]}; this version reads "
        f"{FORMAT_VERSION} only",
        f"use the version of escala that wrote it{f' ({writer})' if writer else ''}, or move the directory away "
        "to train without it",
    )


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with its size and hash in the manifest. Raises CheckpointError naming the file."""
    _check_files(checkpoint, hashed=True)
    remember(checkpoint)


def _check_files(checkpoint: Checkpoint, hashed: bool) -> None:
    try:
        for name, entry in checkpoint.manifest["files"].items():
            check_file(checkpoint.path / name, entry, hashed)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {checkpoint.path} is damaged: {error}", REWRITE) from error


_verified: dict[Path, object] = {}  # by this process: what `_state` was when the hashes were right


def remember(checkpoint: Checkpoint) -> None:
    """Say that the hashes of `checkpoint` are right now, so that retention need not read its files again."""
    _verified[checkpoint.path] = _state(checkpoint)


def _state(checkpoint: Checkpoint) -> object:
    """What changes where somebody writes to a file of the checkpoint."""
    try:
        found = [os.stat(checkpoint.path / name) for name in (MANIFEST, *checkpoint.manifest["files"])]
    except OSError as error:
        raise CheckpointError(f"checkpoint {checkpoint.path} is damaged: {error}", REWRITE) from error
    return [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found]


def _verify_once(checkpoint: Checkpoint) -> None:
    if _verified.get(checkpoint.path) != _state(checkpoint):
        verify(checkpoint)


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """The finished checkpoints in `directory` with readable manifests, oldest first. Files are not hashed."""
    found = []
    for path in _finished(directory):
        try:
            found.append(read_checkpoint(path))
        except CheckpointError:
            continue  # latest() names the ones that it refuses
    return found


def latest(
    directory: Path, needs: Mapping[str, type[Any]] | None = None
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint in `directory` whose hashes are right, and why newer ones were refused.

    Returns None where there is no good one. Partial directories count as refused when they are newer.

    Args:
        needs: dotted keys that the manifest must have, with their types.
    """
    refused: list[CheckpointError] = []
    try:
        entries = _entries(directory)
    except CheckpointError as error:
        return None, [error]
    for path in sorted(entries, key=lambda p: (step_of(p.name), p.name), reverse=True):
        if DAMAGED in path.name:
            continue
        try:
            checkpoint = read_checkpoint(path)
            for where, kind in (needs or {}).items():
                checkpoint.part(where, kind)
            verify(checkpoint)
        except CheckpointError as error:
            refused.append(error)
            continue
        return checkpoint, refused
    return None, refused


def newest(
    directory: Path, needs: Mapping[str, type[Any]] | None = None
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """As `latest`; raises CheckpointError where there are finished checkpoints and none of them is good: training from
    the beginning, or from something else, would silently lose what they hold.
    """
    found, refused = latest(directory, needs)
    if found is None and refused and (finished := _finished(directory)):
        about = [e for e in refused if PARTIAL not in e.message] or refused
        raise _none_usable(directory, about[0], len(finished))
    return found, refused


def check_readable(directory: Path) -> None:
    """Raise CheckpointError where there are finished checkpoints and no manifest of them can be used. Reads no other
    files: for those who only name a job's checkpoints.
    """
    finished = _finished(directory)
    refused: list[CheckpointError] = []
    for path in reversed(finished):
        try:
            read_checkpoint(path)
            return
        except CheckpointError as error:
            refused.append(error)
    if refused:
        raise _none_usable(directory, refused[0], len(finished))


def _none_usable(directory: Path, newest: CheckpointError, finished: int) -> CheckpointError:
    others = f" (and {finished - 1} more)" if finished > 1 else ""
    return CheckpointError(
        f"none of the checkpoints in {directory} can be used: {newest.message}{others}",
        f"{newest.hint}; to start from the beginning, move these directories away",
    )


def retention(directory: Path, keep: int) -> Retention:
    """What to free in `directory`, and what is damaged in it. Only good checkpoints count, and only good ones and stale
    partial ones are to be deleted.

    Where more than `keep` look whole, they are hashed (once in a process, unless they change).
    """
    whole, damaged, partial = list[Checkpoint](), list[CheckpointError](), list[str]()
    try:
        entries = [path for path in _entries(directory) if not path.is_symlink()]
    except (CheckpointError, OSError) as error:
        return Retention(damaged=[CheckpointError(str(error))])
    for path in sorted(entries, key=lambda p: p.name):
        if path.name.endswith(PARTIAL):
            partial.append(path.name)
        elif DAMAGED in path.name:
            damaged.append(CheckpointError(f"checkpoint {path} was set aside: it could not be used", REWRITE))
        else:
            _sort_in(path, whole, damaged, hashed=False)
    if len(whole) > keep:
        candidates, whole = whole, []
        for checkpoint in candidates:
            _sort_in(checkpoint.path, whole, damaged, hashed=True)
    return Retention(to_delete([*(c.path.name for c in whole), *partial], keep), damaged)


def _sort_in(path: Path, good: list[Checkpoint], damaged: list[CheckpointError], hashed: bool) -> None:
    try:
        checkpoint = read_checkpoint(path)
        _verify_once(checkpoint) if hashed else _check_files(checkpoint, hashed=False)
    except CheckpointError as error:
        damaged.append(error)
    else:
        good.append(checkpoint)


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


def tokenizer_entries(directory: Path) -> dict[str, Any]:
    """What a manifest says of the tokenizer beside the checkpoints in `directory`. Raises OSError."""
    return {path.name: file_entry(path) for path in _tokenizer_files(directory)}


def verify_tokenizer(checkpoint: Checkpoint) -> None:
    """Compare the tokenizer beside a checkpoint with what its manifest says of it. Raises CheckpointError."""
    entries, directory = checkpoint.part("tokenizer", dict), checkpoint.path.parent
    try:
        check_entries(entries)
        others = sorted(entries.keys() ^ {path.name for path in _tokenizer_files(directory)})
        if others:
            raise ValueError(f"{others[0]} is {'missing' if others[0] in entries else 'not of it'}")
        for name, entry in entries.items():
            check_file(directory / TOKENIZER / name, entry)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer in {directory / TOKENIZER} is not the one that {checkpoint.path.name} was written with: "
            f"{error}",
            "copy the files of its tokenizer there again; `escala jobs retry` does so, too",
        ) from error


def _tokenizer_files(directory: Path) -> list[Path]:
    place = directory / TOKENIZER
    return sorted(p for p in place.iterdir() if not p.name.startswith(".")) if place.is_dir() else []


def check_fits(checkpoint: Checkpoint, model: Mapping[str, Any], tokenizer_fingerprint: str) -> None:
    """Raise CheckpointError, naming the keys that differ, unless `checkpoint` is of this model and
    tokenizer. Whether workers share the experts is not the model's: checkpoints have them all.
    """
    theirs, model = _whole(checkpoint.part("config.model", dict)), _whole(model)
    differing = sorted(k for k in theirs.keys() | model.keys() if theirs.get(k) != model.get(k))
    if differing:
        pairs = ", ".join(f"{k}: {theirs.get(k)} there, {model.get(k)} here" for k in differing)
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is of another model ({pairs})",
            "set these model keys to the checkpoint's values, or start without it",
        )
    stored = checkpoint.part("fingerprints.tokenizer", str)
    if stored != tokenizer_fingerprint:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} was trained with another tokenizer "
            f"({stored[:12]}, not {tokenizer_fingerprint[:12]})",
            "give the tokenizer.json of that job as data.tokenizer.path, or start without the checkpoint",
        )


def _whole(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model without how its experts lie on the workers."""
    moe = model.get("moe")
    if not isinstance(moe, dict):
        return {**model, "moe": moe}
    return {**model, "moe": {key: value for key, value in moe.items() if key != "expert_parallel"}}


def _entries(directory: Path) -> list[Path]:
    """Everything in `directory` that is named as a checkpoint. Raises CheckpointError where it cannot be read."""
    try:
        return [path for path in directory.iterdir() if step_of(path.name) is not None]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints in {directory} cannot be read: {error.strerror or error}",
            "it must be a directory that you may read",
        ) from error


def _finished(directory: Path) -> list[Path]:
    """Those that were finished, whatever has become of them, oldest first. Raises CheckpointError."""
    found = [p for p in _entries(directory) if p.name == checkpoint_name(step_of(p.name) or 0)]
    return sorted(found, key=lambda p: step_of(p.name) or 0)
