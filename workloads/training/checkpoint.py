"""Checkpoints that do not know how many ranks or which ZeRO stage wrote them.

Safetensors files of each rank, holding whole fp32 tensors (`master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`),
and a manifest. A file is written as soon as its tensors are there: a rank holds no more than one file's.
Other engines than the first one have their own name before theirs (`critic/master/NAME`). Safe loaders only:
nothing here unpickles. `escala.storage` knows where they are and which one is used.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file
from torch import Tensor

from escala.contract.checkpoints import FORMAT_VERSION, checkpoint_name
from escala.contract.errors import CheckpointError
from escala.contract.sealed import seal
from escala.storage.base import CheckpointStore
from escala.storage.checkpoints import Checkpoint, read_checkpoint, remember, retention, verify
from workloads.model.weights import names, opened
from workloads.training import zero

FILE_BYTES, FILES = 64 * 2**20, 16
"""A rank's files have so much, or are so many where that would be less, and a tensor more. safetensors copies all of a
file while it writes."""


def save(
    engine: Any,
    store: CheckpointStore,
    step: int,
    manifest: dict[str, Any],
    keep: int,
    other_engines: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write checkpoint `step` into `store` and free what retention does not keep. A collective call.

    `manifest` is the caller's part (config, tokens, data position, ...). Each rank writes a share of the
    tensors, and rank 0 publishes the checkpoint when all files are there. Raises CheckpointError, on all ranks,
    where one cannot write.

    Args:
        engine: whose weights are the run's model.
        other_engines: what else is trained, by name.
    """
    engines = _prefixed(engine, other_engines)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    name = checkpoint_name(step)
    unmade = _begin(store, name) if rank == 0 else ""
    torch.distributed.barrier()
    file = _RankFiles(store, name, f"rank-{rank:05d}-of-{ranks:05d}")
    failure = file.write_share(_share(engines, ranks), _file_bytes(engines, ranks))
    gathered: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(gathered, (file.entries, unmade or failure))
    files = {file: facts for found, _ in gathered for file, facts in found.items()}
    whole = manifest | {
        "format_version": FORMAT_VERSION,
        "step": step,
        "adam_step": zero.adam_step(engine),
        "adam_steps_beside": {  # of the other engines: the format's name for them
            name: zero.adam_step(one) for name, one in (other_engines or {}).items()
        },
        "written_by": {"ranks": ranks, "zero_stage": int(engine.zero_optimization_stage())},
        "files": files,
    }
    failures = [failure for _, failure in gathered if failure]
    if rank == 0 and not failures:
        failures = _publish(store, name, whole)
    failures = _from_first(failures)
    if failures:
        raise CheckpointError(
            f"checkpoint {name} cannot be written: {failures[0]}", "see that there is room for it"
        )
    if rank == 0:
        remember(read_checkpoint(store, name))  # hashed as they were written
        for stale in retention(store, keep).delete:
            with suppress(OSError):
                store.delete(stale)
    torch.distributed.barrier()
    return read_checkpoint(store, name)


def _begin(store: CheckpointStore, name: str) -> str:
    """Make room for a new checkpoint. Returns what went wrong ("" if nothing): the ranks' writes fail after it, and
    would only say that there is no such directory.
    """
    try:
        store.begin(name)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _from_first(failures: list[str]) -> list[str]:
    """Rank 0's failures, on every rank."""
    shared = [failures]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def load(engine: Any, checkpoint: Checkpoint, other_engines: Mapping[str, Any] | None = None) -> None:
    """Restore weights and optimisers from a verified checkpoint, at any number of ranks and any ZeRO stage.

    Raises CheckpointError where the tensors are not those of the engines' models.
    """
    stored, engines = _index(checkpoint), _prefixed(engine, other_engines)
    shapes = {
        f"{prefix}{key}/{name}": shape
        for prefix, one in engines.items()
        for name, shape in zero.parameter_shapes(one).items()
        for key in zero.STATE_KEYS
    }
    _check_shapes(checkpoint, stored, shapes)
    with ExitStack() as stack:
        files = {file for file, _ in stored.values()}
        readers = {file: stack.enter_context(opened(checkpoint, file)) for file in files}
        for prefix, one in engines.items():
            where = f"adam_steps_beside.{prefix[:-1]}" if prefix else "adam_step"
            zero.begin_restore(one, checkpoint.part(where, int))
            for name in zero.parameter_shapes(one):
                for key in zero.STATE_KEYS:
                    tensor = f"{prefix}{key}/{name}"
                    zero.set_state(one, name, key, readers[stored[tensor][0]].get_tensor(tensor))
            zero.end_restore(one)


def _prefixed(engine: Any, other_engines: Mapping[str, Any] | None) -> dict[str, Any]:
    """Engines by what their tensors' names begin with."""
    return {"": engine, **{f"{name}/": one for name, one in (other_engines or {}).items()}}


def assign(shapes: dict[str, tuple[int, ...]], ranks: int) -> dict[str, int]:
    """Parameter name -> the rank that writes it: the largest first, each to the rank with the least so
    far.
    """
    load = [0] * ranks
    owners = {}
    for name, shape in sorted(shapes.items(), key=lambda item: (-torch.Size(item[1]).numel(), item[0])):
        owners[name] = load.index(min(load))
        load[owners[name]] += torch.Size(shape).numel()
    return owners


def _file_bytes(engines: Mapping[str, Any], ranks: int) -> int:
    """From what size on a file is written; the ranks' shares are about equal."""
    shapes = [shape for engine in engines.values() for shape in zero.parameter_shapes(engine).values()]
    elements = len(zero.STATE_KEYS) * sum(map(math.prod, shapes))
    return max(FILE_BYTES, 4 * elements // ranks // FILES)


def _share(engines: Mapping[str, Any], ranks: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors that this rank writes, whole, by name. A collective call at each step: every rank takes all."""
    for prefix, engine in engines.items():
        zero.link_state(engine)
        for name, owner in assign(zero.parameter_shapes(engine), ranks).items():
            for key in zero.STATE_KEYS:
                full = zero.gather_state(engine, name, key, owner)
                if full is not None:
                    yield f"{prefix}{key}/{name}", full.contiguous()


class _RankFiles:
    """The files STEM-0.safetensors, ... that a rank writes into a new checkpoint. `entries`: as the manifest lists
    them.
    """

    def __init__(self, store: CheckpointStore, name: str, stem: str) -> None:
        self._store, self._name, self._stem = store, name, stem
        self.entries: dict[str, Any] = {}

    def write_share(self, tensors: Iterator[tuple[str, Tensor]], file_bytes: int) -> str:
        """Write files of about so many bytes; returns what went wrong ("" if nothing). All tensors are taken even then,
        since the other ranks wait for it.
        """
        waiting: dict[str, Tensor] = {}
        failure = ""
        for name, tensor in tensors:
            if failure:
                continue
            waiting[name] = tensor
            if sum(t.nbytes for t in waiting.values()) >= file_bytes:
                failure = self._write(waiting)
        return failure or self._write(waiting)

    def _write(self, tensors: dict[str, Tensor]) -> str:
        """Write the next file, and empty `tensors`; returns what went wrong."""
        if not tensors:
            return ""
        file = f"{self._stem}-{len(self.entries)}.safetensors"
        try:
            self.entries[file] = self._store.put(self._name, file, lambda path: save_file(tensors, path))
        except Exception as error:  # noqa: BLE001  safetensors has its own; the other ranks wait for our word
            return f"{type(error).__name__}: {error}"
        tensors.clear()
        return ""


def _publish(store: CheckpointStore, name: str, manifest: dict[str, Any]) -> list[str]:
    """From here on the checkpoint exists. Returns what went wrong, if anything.

    What stands under that name already is replaced where it is good, and set aside where it is not.
    """
    try:
        whole = seal(manifest | {"tokenizer": store.tokenizer_entries()})
        aside = store.publish(name, whole, replace=_is_good(store, name))
    except OSError as error:
        return [f"{type(error).__name__}: {error}"]
    if aside is not None:
        print(
            f"{store.address}/{name} could not be used and was set aside as {aside}",
            file=sys.stderr,
            flush=True,
        )
    return []


def _is_good(store: CheckpointStore, name: str) -> bool:
    try:
        verify(read_checkpoint(store, name))
    except CheckpointError:
        return False
    return True


def _index(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Stored tensor's name -> the file that has it, and its shape."""
    stored = {}
    for file in checkpoint.manifest["files"]:
        with opened(checkpoint, file) as reader:
            for name in names(reader):
                stored[name] = (file, tuple(reader.get_slice(name).get_shape()))
    return stored


def _check_shapes(
    checkpoint: Checkpoint,
    stored: dict[str, tuple[str, tuple[int, ...]]],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    odd = sorted(shapes.keys() ^ stored.keys())
    if odd:
        raise CheckpointError(
            f"checkpoint {checkpoint.address} and the model differ in their tensors: {odd[:4]}"
        )
    for tensor, (_, found) in stored.items():
        if found != shapes[tensor]:
            raise CheckpointError(
                f"checkpoint {checkpoint.address}: {tensor} is {found}, the model has {shapes[tensor]}"
            )
