"""The protocols of the places where the checkpoints of a job and the files of a home's jobs are. Every implementation
passes tests/contracts/test_storage.py.

They ask for nothing that an object store lacks: no renaming, no appending, no memory map. What is the same for all
places is beside them: which checkpoint is the newest good one, what a rule frees (`storage/checkpoints.py`), records
(`storage/files.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol


class CheckpointStore(Protocol):
    """The checkpoints of one job, by name (contract/checkpoints.py), and the tokenizer beside them.

    A checkpoint is written by any number of processes, each with a store of its own for the same address: one calls
    `begin`, then each `put`, then one `publish`. Before `publish` has returned it is not there for readers; a process
    that is killed leaves at most a partial one, which never counts.
    """

    @property
    def address(self) -> str:
        """Where it is: the path of a directory, or a URL. Equal addresses are the same store."""
        ...

    def names(self, *, own: bool = False) -> list[str]:
        """The checkpoints that there are: finished, partial, set aside; with `own`, without links to another place's.

        Raises CheckpointError where that cannot be read; a store that nobody has written to is empty.
        """
        ...

    def manifest(self, name: str) -> dict[str, Any]:
        """What the manifest of a checkpoint says, unchecked. Raises ValueError with the reason where it is no JSON
        object, or cannot be read.
        """
        ...

    def check(self, name: str, entries: Mapping[str, Any], *, hashed: bool) -> None:
        """Compare a checkpoint's files with what its manifest says of them; not their hashes, unless `hashed`. Raises
        ValueError that names the file.
        """
        ...

    def state(self, name: str, files: list[str]) -> object:
        """What changes where somebody writes to one of these files of a checkpoint. Raises OSError."""
        ...

    def open(self, name: str, file: str) -> BinaryIO:
        """A file of a checkpoint, to read and to seek in. Raises OSError."""
        ...

    def local(self, name: str, file: str) -> AbstractContextManager[Path]:
        """A file of a checkpoint as a path on this machine, for the time of the context. Raises OSError."""
        ...

    def size_bytes(self, name: str) -> int:
        """Bytes of all files of a checkpoint, finished or not. Raises OSError."""
        ...

    def begin(self, name: str) -> None:
        """Make room for a new checkpoint; what is left of an earlier try of it goes. Raises OSError."""
        ...

    def put(self, name: str, file: str, write: Callable[[Path], None]) -> dict[str, Any]:
        """Store a file of a checkpoint that has begun: what `write` writes to a path on this machine. Returns what the
        manifest has to say of it. Raises OSError, and what `write` raises.
        """
        ...

    def publish(self, name: str, manifest: Mapping[str, Any], *, replace: bool) -> str | None:
        """Finish a checkpoint with its sealed manifest: from here on it is there. One of this name that is there
        already is deleted (`replace`), or set aside under another name, which is returned. Raises OSError.
        """
        ...

    def delete(self, name: str) -> None:
        """Delete a checkpoint, finished or not. Nothing happens where it is not there. Raises OSError."""
        ...

    def tokenizer_entries(self) -> dict[str, Any]:
        """What a manifest says of the tokenizer: file -> {"sha256", "bytes"}. Empty where there is none."""
        ...

    def check_tokenizer(self, entries: Mapping[str, Any]) -> None:
        """Raise ValueError with the reason unless the tokenizer is the one of these entries."""
        ...

    def put_tokenizer(self, files: Mapping[str, Path], *, replace: bool) -> None:
        """Copy the files of a tokenizer, each whole or not at all; with `replace`, in place of all that was there."""
        ...


class FileStore(Protocol):
    """The files of a home that its jobs share, by name: `jobs/JOB/attempt-1/progress.json` (contract/records.JobFiles
    has the names, relative to the home).
    """

    def read(self, name: PurePath, start: int = 0) -> bytes:
        """A file's content from byte `start` on. Raises FileNotFoundError, another OSError where it cannot be read, and
        ValueError for what is no file.
        """
        ...

    def write(self, name: PurePath, content: bytes) -> None:
        """Write a file, so that a reader sees the old content or the new one, whatever happens. Raises OSError."""
        ...

    def exists(self, name: PurePath) -> bool:
        """Whether there is such a file, or a file below this name."""
        ...

    def set_aside(self, name: PurePath, why: str) -> None:
        """Give a damaged file another name, and say so in the log, so that another may be written in its place."""
        ...

    def write_folder(self, name: PurePath, contents: Mapping[str, bytes]) -> None:
        """Write all of these files below `name`, or none. Nothing happens where there are some. Raises OSError."""
        ...

    def local(self, name: PurePath) -> Path:
        """Where the processes of a job find a file or folder."""
        ...
