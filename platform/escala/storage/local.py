"""Checkpoints and files in a directory, on a disk or on a file system that the cluster's nodes share.

A checkpoint is written under the name `step-00000100.partial` and renamed when all of it is there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from escala.contract.checkpoints import DAMAGED, MANIFEST, PARTIAL, TOKENIZER, file_entry, step_of
from escala.contract.errors import CheckpointError
from escala.contract.files import rename_whole, replacing, set_aside, sync, write_whole
from escala.contract.records import read_regular, write_json
from escala.contract.sealed import check_entries, check_file, open_regular, read_json_object


@dataclass(frozen=True)
class LocalCheckpoints:
    """Implements CheckpointStore."""

    directory: Path

    @property
    def address(self) -> str:
        """The directory's path."""
        return str(self.directory)

    def names(self, *, own: bool = False) -> list[str]:
        """See CheckpointStore."""
        try:
            found = [path for path in self.directory.iterdir() if step_of(path.name) is not None]
            return sorted(path.name for path in found if not (own and path.is_symlink()))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"the checkpoints in {self.directory} cannot be read: {error.strerror or error}",
                "it must be a directory that you may read",
            ) from error

    def manifest(self, name: str) -> dict[str, Any]:
        """See CheckpointStore."""
        return read_json_object(self.directory / name / MANIFEST)

    def check(self, name: str, entries: Mapping[str, Any], *, hashed: bool) -> None:
        """See CheckpointStore."""
        for file, entry in entries.items():
            check_file(self.directory / name / file, entry, hashed)

    def state(self, name: str, files: list[str]) -> object:
        """See CheckpointStore."""
        found = [os.stat(self.directory / name / file) for file in files]
        return [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found]

    def open(self, name: str, file: str) -> BinaryIO:
        """See CheckpointStore."""
        return open_regular(self.directory / name / file)

    @contextmanager
    def local(self, name: str, file: str) -> Iterator[Path]:
        """See CheckpointStore."""
        yield self.directory / name / file

    def size_bytes(self, name: str) -> int:
        """See CheckpointStore."""
        return sum(p.stat().st_size for p in (self.directory / name).rglob("*") if p.is_file())

    def begin(self, name: str) -> None:
        """See CheckpointStore."""
        shutil.rmtree(self._partial(name), ignore_errors=True)  # of an attempt that died while writing
        self._partial(name).mkdir(parents=True)

    def put(self, name: str, file: str, write: Callable[[Path], None]) -> dict[str, Any]:
        """See CheckpointStore."""
        path = self._partial(name) / file
        write(path)
        sync(path)
        return file_entry(path)

    def publish(self, name: str, manifest: Mapping[str, Any], *, replace: bool) -> str | None:
        """See CheckpointStore."""
        partial, final = self._partial(name), self.directory / name
        aside = final.with_name(f"{name}{DAMAGED}-{uuid.uuid4().hex[:8]}")
        write_json(partial / MANIFEST, dict(manifest))
        if final.exists():
            os.rename(final, aside)
        os.rename(partial, final)  # its files and itself are on the disk: each was synced as it was written
        sync(self.directory)
        if replace:
            shutil.rmtree(aside, ignore_errors=True)
        return aside.name if aside.exists() else None

    def delete(self, name: str) -> None:
        """See CheckpointStore."""
        if (self.directory / name).exists():
            shutil.rmtree(self.directory / name)

    def tokenizer_entries(self) -> dict[str, Any]:
        """See CheckpointStore."""
        return {path.name: file_entry(path) for path in self._tokenizer_files()}

    def check_tokenizer(self, entries: Mapping[str, Any]) -> None:
        """See CheckpointStore."""
        check_entries(entries)
        others = sorted(entries.keys() ^ {path.name for path in self._tokenizer_files()})
        if others:
            raise ValueError(f"{others[0]} is {'missing' if others[0] in entries else 'not of it'}")
        for name, entry in entries.items():
            check_file(self.directory / TOKENIZER / name, entry)

    def put_tokenizer(self, files: Mapping[str, Path], *, replace: bool) -> None:
        """See CheckpointStore."""
        target = self.directory / TOKENIZER
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            with replacing(target / name) as temporary:
                shutil.copyfile(file, temporary)

    def _partial(self, name: str) -> Path:
        return self.directory / (name + PARTIAL)

    def _tokenizer_files(self) -> list[Path]:
        place = self.directory / TOKENIZER
        return sorted(p for p in place.iterdir() if not p.name.startswith(".")) if place.is_dir() else []


@dataclass(frozen=True)
class LocalFiles:
    """Implements FileStore."""

    root: Path

    def read(self, name: PurePath, start: int = 0) -> bytes:
        """See FileStore."""
        return read_regular(self.root / name, start)

    def write(self, name: PurePath, content: bytes) -> None:
        """See FileStore."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)

    def exists(self, name: PurePath) -> bool:
        """See FileStore."""
        return (self.root / name).exists()

    def set_aside(self, name: PurePath, why: str) -> None:
        """See FileStore."""
        set_aside(self.root / name, why)

    def write_folder(self, name: PurePath, contents: Mapping[str, bytes]) -> None:
        """See FileStore."""
        target = self.root / name
        if target.is_dir():
            return
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix="."))
        try:
            for file, content in contents.items():
                path = fresh / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            rename_whole(fresh, target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def local(self, name: PurePath) -> Path:
        """See FileStore."""
        return self.root / name
