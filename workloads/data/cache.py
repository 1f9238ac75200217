"""Directories named by what was made into them, written once, never changed, checked by hash when they are read.

A token directory is one corpus by one tokenizer, memory-mapped by every worker: {train,held_out}.bin, beside each the
SHA-256 of its blocks of 64 KiB, and manifest.json. Every directory has contents.json: the SHA-256 of each file whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from escala.contract.checkpoints import file_entry
from escala.contract.errors import DataError
from escala.contract.files import rename_whole
from escala.contract.records import write_json
from escala.contract.sealed import check_entries, check_file, read_sealed, seal

SPLITS = ("train", "held_out")
CONTENTS = "contents.json"  # the hash of each other file of a directory, and of itself
BLOCK_BYTES, HASH_BYTES = 1 << 16, 32
"""A block takes 0.06 ms to hash, once; the hashes of 100 GB of tokens take 50 MB."""

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True)
class TokenSplit:
    """One side of a corpus. Documents of text are separated by end-of-text, which `tokens` includes."""

    tokens: int
    documents: int
    text_bytes: int  # UTF-8, without the end-of-text tokens
    documents_sha256: str  # of the documents' hashes in order


@dataclass(frozen=True)
class Manifest:
    """What a token directory holds."""

    dtype: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    train: TokenSplit
    held_out: TokenSplit


class TokenWriter:
    """Appends documents to train.bin and held_out.bin of a directory, each followed by the token `end_of_text` where
    there is one. `close` returns the manifest.
    """

    def __init__(self, directory: Path, vocab_size: int, end_of_text: int | None) -> None:
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self._directory = directory
        self._end = np.array([] if end_of_text is None else [end_of_text], dtype=np.uint32)
        self._files = [(directory / f"{split}.bin").open("wb") for split in SPLITS]
        self._hashes = [hashlib.sha256() for _ in SPLITS]
        self._counts = np.zeros((len(SPLITS), 3), dtype=np.int64)

    def add(self, ids: npt.NDArray[np.uint32], digest: bytes, text_bytes: int, held_out: bool) -> None:
        """Append one document, and the end-of-text token."""
        side = int(held_out)
        self._files[side].write(np.concatenate([ids, self._end]).astype(self.dtype).tobytes())
        self._hashes[side].update(digest)
        self._counts[side] += (len(ids) + len(self._end), 1, text_bytes)

    def close(self, corpus_fingerprint: str, tokenizer_fingerprint: str) -> Manifest:
        """Close the files and describe them; the manifest is written last."""
        splits = []
        for split, file, documents, counts in zip(
            SPLITS, self._files, self._hashes, self._counts, strict=True
        ):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            _write_block_hashes(self._directory / f"{split}.bin")
            tokens, count, text_bytes = (int(number) for number in counts)
            splits.append(TokenSplit(tokens, count, text_bytes, documents.hexdigest()))
        manifest = Manifest(self.dtype.name, corpus_fingerprint, tokenizer_fingerprint, *splits)
        write_json(self._directory / "manifest.json", asdict(manifest))
        return manifest


class TokenFile:
    """The tokens of one split, memory-mapped. A block is compared with its hash when this process first reads it:
    what was changed on the disk since it was written is not trained on.
    """

    def __init__(self, path: Path, dtype: str, tokens: int) -> None:
        self._path, self.dtype = path, np.dtype(dtype)
        self._bytes = np.memmap(path, np.uint8, "r") if tokens else np.empty(0, np.uint8)
        self._tokens: Tokens = self._bytes.view(self.dtype)
        self._hashes = block_hashes_path(path).read_bytes()
        self._checked = bytearray(len(self._hashes) // HASH_BYTES)
        if len(self._checked) != -(-len(self._bytes) // BLOCK_BYTES) or len(self._tokens) != tokens:
            raise damaged(path, "its blocks are not those that were written")
        for end in {0, len(self._checked) - 1} if tokens else ():
            self._check(end)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, part: slice) -> Tokens:
        """Tokens of a slice with step 1. Raises DataError that names the file and the block which was changed."""
        start, stop, _ = part.indices(len(self))
        size = self.dtype.itemsize
        for block in range(start * size // BLOCK_BYTES, -(-stop * size // BLOCK_BYTES)):
            if not self._checked[block]:
                self._check(block)
        return self._tokens[start:stop]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self[:], dtype=dtype)

    def _check(self, block: int) -> None:
        first, last = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, len(self._bytes))
        right = self._hashes[block * HASH_BYTES : (block + 1) * HASH_BYTES]
        if hashlib.sha256(self._bytes[first:last].data).digest() != right:
            raise damaged(self._path, f"the hash of block {block} (bytes {first} to {last - 1}) differs")
        self._checked[block] = True


class TokenDirectory:
    """A finished token directory, opened and checked: sizes, all small files, and the first and last block of tokens.
    The other blocks are checked when they are read.

    Raises DataError where a file is missing, cut or changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_directory(path, lazily=[f"{split}.bin" for split in SPLITS])
        try:
            data = json.loads((path / "manifest.json").read_text())
            self.manifest = Manifest(
                **{**data, "train": TokenSplit(**data["train"]), "held_out": TokenSplit(**data["held_out"])}
            )
            self._files = {name: self._open(name) for name in SPLITS}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise damaged(path / "manifest.json", str(error)) from error

    def _open(self, name: str) -> TokenFile:
        return TokenFile(self.path / f"{name}.bin", self.manifest.dtype, getattr(self.manifest, name).tokens)

    def tokens(self, split: str) -> TokenFile:
        """The tokens of "train" or "held_out"."""
        return self._files[split]


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A temporary directory that becomes `final` at the end of the block, whole and with the hash of each of its files
    (`check_directory`), or not at all.

    Where somebody else finished `final` meanwhile, theirs stays: equal names hold equal content.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name[:16]}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        entries = {path.name: file_entry(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / CONTENTS, seal({"files": entries}))
        try:
            rename_whole(temporary, final)
        except OSError:
            if not is_stored(final):
                _replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, final: Path) -> None:
    """Put `temporary` where a directory without hashes is, which an earlier version left."""
    shutil.rmtree(final, ignore_errors=True)
    try:
        os.rename(temporary, final)
    except OSError:
        if not is_stored(final):  # nobody else has done so meanwhile
            raise


def is_stored(path: Path) -> bool:
    """Whether `new_directory` has made `path`; `check_directory` says whether it is still whole."""
    return (path / CONTENTS).is_file()


def check_directory(path: Path, lazily: Collection[str] = ()) -> None:
    """Compare the files of a directory that `new_directory` made with their hashes; of those in `lazily`, the size.

    Raises DataError naming the file.
    """
    try:
        entries: Any = read_sealed(path / CONTENTS).get("files")
        check_entries(entries)
    except ValueError as error:
        raise damaged(path / CONTENTS, str(error)) from error
    for name, entry in entries.items():
        try:
            check_file(path / name, entry, hashed=name not in lazily)
        except ValueError as error:
            raise damaged(path / name, str(error)) from error


def damaged(file: Path, why: str) -> DataError:
    """What a user reads of a stored file that is not what was written."""
    return DataError(
        f"The store {file.parent} is damaged: {file.name}: {why}.",
        "Delete that directory; the next run writes it again (a retried job goes on from its checkpoint).",
    )


def block_hashes_path(file: Path) -> Path:
    """Where the SHA-256 of each block of a token file stands: 32 bytes a block."""
    return file.with_suffix(".sha256")


def _write_block_hashes(file: Path) -> None:
    with file.open("rb") as stream, block_hashes_path(file).open("wb") as hashes:
        while block := stream.read(BLOCK_BYTES):
            hashes.write(hashlib.sha256(block).digest())
