"""Token files: one corpus, one tokenizer, written once, memory-mapped by every worker, never changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from escala.errors import DataError
from escala.files import rename_whole
from escala.records import write_json

SPLITS = ("train", "held_out")
_CHECKED_BYTES = 1 << 16  # of a file's head and tail, when it is opened
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Split:
    """One side of a corpus. `documents` are separated by end-of-text, which `tokens` includes."""

    tokens: int
    documents: int
    text_bytes: int  # UTF-8, without the end-of-text tokens
    ends_sha256: str  # of the file's first and last 64 KiB
    documents_sha256: str  # of the documents' hashes in order


@dataclass(frozen=True)
class Manifest:
    """What a token directory holds."""

    dtype: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    train: Split
    held_out: Split


class TokenWriter:
    """Appends documents to train.bin and held_out.bin of a directory. `close` returns the manifest."""

    def __init__(self, directory: Path, vocab_size: int, end_of_text: int) -> None:
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self._directory, self._end = directory, end_of_text
        self._files = [(directory / f"{split}.bin").open("wb") for split in SPLITS]
        self._hashes = [hashlib.sha256() for _ in SPLITS]
        self._counts = np.zeros((len(SPLITS), 3), dtype=np.int64)

    def add(self, ids: npt.NDArray[np.uint32], digest: bytes, text_bytes: int, held_out: bool) -> None:
        """Append one document and the end-of-text token."""
        side = int(held_out)
        self._files[side].write(np.append(ids, self._end).astype(self.dtype).tobytes())
        self._hashes[side].update(digest)
        self._counts[side] += (len(ids) + 1, 1, text_bytes)

    def close(self, corpus_fingerprint: str, tokenizer_fingerprint: str) -> Manifest:
        """Close the files and describe them; the manifest is written last."""
        splits = []
        for split, file, documents, counts in zip(
            SPLITS, self._files, self._hashes, self._counts, strict=True
        ):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            ends = _ends_sha256(self._directory / f"{split}.bin")
            splits.append(Split(*map(int, counts), ends, documents.hexdigest()))
        manifest = Manifest(self.dtype.name, corpus_fingerprint, tokenizer_fingerprint, *splits)
        write_json(self._directory / "manifest.json", manifest)
        return manifest


class TokenDirectory:
    """A finished token directory, opened and checked: sizes, and the hash of each file's ends.

    Raises DataError where a file is missing, cut or changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = json.loads((path / "manifest.json").read_text())
            self.manifest = Manifest(
                **{**data, "train": Split(**data["train"]), "held_out": Split(**data["held_out"])}
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._damaged("manifest.json", str(error)) from error
        for name in SPLITS:
            self._check(name, getattr(self.manifest, name))

    def _check(self, name: str, split: Split) -> None:
        file = self.path / f"{name}.bin"
        expected = split.tokens * np.dtype(self.manifest.dtype).itemsize
        found = file.stat().st_size if file.exists() else -1
        if found != expected:
            raise self._damaged(file.name, f"{expected} bytes expected, {max(found, 0)} found")
        if _ends_sha256(file) != split.ends_sha256:
            raise self._damaged(file.name, "its content has changed")

    def _damaged(self, name: str, why: str) -> DataError:
        return DataError(
            f"The token store {self.path} is damaged: {name}: {why}.",
            "Delete that directory; the next run writes it again.",
        )

    def tokens(self, split: str) -> Tokens:
        """The memory-mapped tokens of "train" or "held_out", shape (tokens,)."""
        if getattr(self.manifest, split).tokens == 0:
            return np.empty(0, dtype=self.manifest.dtype)
        return np.memmap(self.path / f"{split}.bin", dtype=self.manifest.dtype, mode="r")


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A temporary directory that becomes `final` at the end of the block, whole, or not at all.

    Where somebody else finished `final` meanwhile, theirs stays: equal names hold equal content.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name[:16]}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        try:
            rename_whole(temporary, final)
        except OSError:
            if not final.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _ends_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(_CHECKED_BYTES))
        stream.seek(max(0, file.stat().st_size - _CHECKED_BYTES))
        digest.update(stream.read(_CHECKED_BYTES))
    return digest.hexdigest()
