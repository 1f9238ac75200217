"""A job's checkpoints, wherever they are: which is the newest good one, and which a rule frees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from escala.contract.checkpoints import (
    DAMAGED,
    MANIFEST,
    PARTIAL,
    TOKENIZER,
    OtherFormat,
    check_manifest,
    is_finished,
    step_of,
    to_delete,
)
from escala.contract.errors import CheckpointError
from escala.storage.base import CheckpointStore
from escala.storage.local import LocalCheckpoints

T = TypeVar("T")
NOT_FINISHED = "a finished one is named step-NNNNNNNN"
REWRITE = "an older one is used where there is one; delete this directory when you do not need it"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: where it is, and what its manifest says."""

    store: CheckpointStore
    name: str
    step: int  # optimiser steps done
    manifest: dict[str, Any]

    @property
    def address(self) -> str:
        """What `checkpoint_at` takes."""
        return f"{self.store.address}/{self.name}"

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
            raise CheckpointError(
                f"checkpoint {self.address} has no usable {where!r} in its manifest", REWRITE
            )
        return found


@dataclass(frozen=True)
class Retention:
    """What a retention rule makes of the checkpoints of a job."""

    delete: list[str] = field(default_factory=list)  # names: good ones beyond the rule, stale partial ones
    damaged: list[CheckpointError] = field(
        default_factory=list
    )  # finished ones that cannot be used: left alone


def open_checkpoints(address: str | Path) -> CheckpointStore:
    """The store of a job's checkpoints at the path of a directory. Nothing is read or made."""
    return LocalCheckpoints(Path(address))


def checkpoint_at(address: str | Path) -> Checkpoint:
    """The checkpoint at the path of its directory; see `read_checkpoint`."""
    path = Path(address)
    return read_checkpoint(open_checkpoints(path.parent), path.name)


def read_checkpoint(store: CheckpointStore, name: str) -> Checkpoint:
    """The checkpoint `name`: its manifest is whole, its files are not yet checked. Raises CheckpointError."""
    step, address = step_of(name), f"{store.address}/{name}"
    if step is None or not is_finished(name):
        raise CheckpointError(f"{address} is not a finished checkpoint", NOT_FINISHED)
    manifest: dict[str, Any] = {}
    try:
        manifest = store.manifest(name)
        check_manifest(manifest, step)
    except OtherFormat as error:
        raise _other_format(address, manifest, error) from None
    except ValueError as error:
        raise CheckpointError(f"checkpoint {address} has no usable manifest: {error}", REWRITE) from error
    return Checkpoint(store, name, step, manifest)


def _other_format(address: str, manifest: Mapping[str, Any], error: OtherFormat) -> CheckpointError:
    versions = manifest.get("versions")
    writer = versions.get("escala") if isinstance(versions, dict) else None
    return CheckpointError(
        f"checkpoint {address} has format {error}",
        f"use the version of escala that wrote it{f' ({writer})' if writer else ''}, or move the directory away "
        "to train without it",
    )


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with its size and hash in the manifest. Raises CheckpointError naming the file."""
    _check_files(checkpoint, hashed=True)
    remember(checkpoint)


def _check_files(checkpoint: Checkpoint, hashed: bool) -> None:
    try:
        checkpoint.store.check(checkpoint.name, checkpoint.manifest["files"], hashed=hashed)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {checkpoint.address} is damaged: {error}", REWRITE) from error


_verified: dict[str, object] = {}  # by this process, by address: what `_state` was when the hashes were right


def remember(checkpoint: Checkpoint) -> None:
    """Say that the hashes of `checkpoint` are right now, so that retention need not read its files again."""
    _verified[checkpoint.address] = _state(checkpoint)


def _state(checkpoint: Checkpoint) -> object:
    """What changes where somebody writes to a file of the checkpoint."""
    try:
        return checkpoint.store.state(checkpoint.name, [MANIFEST, *checkpoint.manifest["files"]])
    except OSError as error:
        raise CheckpointError(f"checkpoint {checkpoint.address} is damaged: {error}", REWRITE) from error


def _verify_once(checkpoint: Checkpoint) -> None:
    if _verified.get(checkpoint.address) != _state(checkpoint):
        verify(checkpoint)


def list_checkpoints(store: CheckpointStore) -> list[Checkpoint]:
    """The finished checkpoints with readable manifests, oldest first. Files are not hashed."""
    found = []
    for name in _finished(store):
        try:
            found.append(read_checkpoint(store, name))
        except CheckpointError:
            continue  # latest() names the ones that it refuses
    return found


def latest(
    store: CheckpointStore, needs: Mapping[str, type[Any]] | None = None
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest checkpoint whose hashes are right, and why newer ones were refused.

    Returns None where there is no good one. Partial ones count as refused when they are newer.

    Args:
        needs: dotted keys that the manifest must have, with their types.
    """
    refused: list[CheckpointError] = []
    try:
        names = store.names()
    except CheckpointError as error:
        return None, [error]
    for name in sorted(names, key=lambda n: (step_of(n), n), reverse=True):
        if DAMAGED in name:
            continue
        try:
            checkpoint = read_checkpoint(store, name)
            for where, kind in (needs or {}).items():
                checkpoint.part(where, kind)
            verify(checkpoint)
        except CheckpointError as error:
            refused.append(error)
            continue
        return checkpoint, refused
    return None, refused


def newest(
    store: CheckpointStore, needs: Mapping[str, type[Any]] | None = None
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """As `latest`; raises CheckpointError where there are finished checkpoints and none of them is good: training from
    the beginning, or from something else, would silently lose what they hold.
    """
    found, refused = latest(store, needs)
    if found is None and refused and (finished := _finished(store)):
        about = [e for e in refused if PARTIAL not in e.message] or refused
        raise _none_usable(store, about[0], len(finished))
    return found, refused


def check_readable(store: CheckpointStore) -> None:
    """Raise CheckpointError where there are finished checkpoints and no manifest of them can be used. Reads no other
    files: for those who only name a job's checkpoints.
    """
    finished = _finished(store)
    refused: list[CheckpointError] = []
    for name in reversed(finished):
        try:
            read_checkpoint(store, name)
            return
        except CheckpointError as error:
            refused.append(error)
    if refused:
        raise _none_usable(store, refused[0], len(finished))


def _none_usable(store: CheckpointStore, newest: CheckpointError, finished: int) -> CheckpointError:
    others = f" (and {finished - 1} more)" if finished > 1 else ""
    return CheckpointError(
        f"none of the checkpoints in {store.address} can be used: {newest.message}{others}",
        f"{newest.hint}; to start from the beginning, move these directories away",
    )


def retention(store: CheckpointStore, keep: int) -> Retention:
    """What to free, and what is damaged. Only good checkpoints count, and only good ones and stale
    partial ones are to be deleted.

    Where more than `keep` look whole, they are hashed (once in a process, unless they change).
    """
    whole, damaged, partial = list[Checkpoint](), list[CheckpointError](), list[str]()
    try:
        names = store.names(own=True)
    except (CheckpointError, OSError) as error:
        return Retention(damaged=[CheckpointError(str(error))])
    for name in names:
        if name.endswith(PARTIAL):
            partial.append(name)
        elif DAMAGED in name:
            why = f"checkpoint {store.address}/{name} was set aside: it could not be used"
            damaged.append(CheckpointError(why, REWRITE))
        else:
            _sort_in(store, name, whole, damaged, hashed=False)
    if len(whole) > keep:
        candidates, whole = whole, []
        for checkpoint in candidates:
            _sort_in(store, checkpoint.name, whole, damaged, hashed=True)
    return Retention(to_delete([*(c.name for c in whole), *partial], keep), damaged)


def _sort_in(
    store: CheckpointStore,
    name: str,
    good: list[Checkpoint],
    damaged: list[CheckpointError],
    hashed: bool,
) -> None:
    try:
        checkpoint = read_checkpoint(store, name)
        _verify_once(checkpoint) if hashed else _check_files(checkpoint, hashed=False)
    except CheckpointError as error:
        damaged.append(error)
    else:
        good.append(checkpoint)


def verify_tokenizer(checkpoint: Checkpoint) -> None:
    """Compare the tokenizer beside a checkpoint with what its manifest says of it. Raises CheckpointError."""
    entries = checkpoint.part("tokenizer", dict)
    try:
        checkpoint.store.check_tokenizer(entries)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer in {checkpoint.store.address}/{TOKENIZER} is not the one that {checkpoint.name} was "
            f"written with: {error}",
            "copy the files of its tokenizer there again; `escala jobs retry` does so, too",
        ) from error


def check_fits(
    checkpoint: Checkpoint,
    model: Mapping[str, Any],
    tokenizer_fingerprint: str,
    read: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
) -> None:
    """Raise CheckpointError, naming the keys that differ, unless `checkpoint` is of this model and
    tokenizer. Whether workers share the experts is not the model's: checkpoints have them all.

    Args:
        read: makes of the manifest's model what it would be written as now.
    """
    theirs, model = _whole(read(checkpoint.part("config.model", dict))), _whole(model)
    differing = sorted(k for k in theirs.keys() | model.keys() if theirs.get(k) != model.get(k))
    if differing:
        pairs = ", ".join(f"{k}: {theirs.get(k)} there, {model.get(k)} here" for k in differing)
        raise CheckpointError(
            f"checkpoint {checkpoint.address} is of another model ({pairs})",
            "set these model keys to the checkpoint's values, or start without it",
        )
    stored = checkpoint.part("fingerprints.tokenizer", str)
    if stored != tokenizer_fingerprint:
        raise CheckpointError(
            f"checkpoint {checkpoint.address} was trained with another tokenizer "
            f"({stored[:12]}, not {tokenizer_fingerprint[:12]})",
            "give the tokenizer.json of that job as data.tokenizer.path, or start without the checkpoint",
        )


def _whole(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model without how its experts lie on the workers."""
    moe = model.get("moe")
    if not isinstance(moe, dict):
        return {**model, "moe": moe}
    return {**model, "moe": {key: value for key, value in moe.items() if key != "expert_parallel"}}


def _finished(store: CheckpointStore) -> list[str]:
    """Those that were finished, whatever has become of them, oldest first. Raises CheckpointError."""
    return sorted((n for n in store.names() if is_finished(n)), key=lambda n: step_of(n) or 0)
