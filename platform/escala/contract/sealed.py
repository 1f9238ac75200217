"""JSON files that carry their own hash, and hashes of other files. Standard library only.

A sealed file is a JSON object whose key `manifest_sha256` holds the SHA-256 of the canonical JSON (sorted keys, no
spaces, ASCII) of all its other keys. So any change of what it says is noticed, and a change that is not noticed
(white space, 1e5 for 1E5) says nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

SEAL = "manifest_sha256"
MAX_BYTES = 64 * 2**20  # of a sealed file: some 300,000 entries of files


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` as it will be read back (string keys, lists), with its hash."""
    plain: dict[str, Any] = json.loads(
        json.dumps({key: value for key, value in content.items() if key != SEAL})
    )
    return plain | {SEAL: _digest(plain)}


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file, its seal not looked at. Raises ValueError with the reason, whatever it is:
    unreadable, a link or no file, too large, not UTF-8, not JSON, nested too deeply, a key twice, not an object.
    """
    try:
        with open_regular(path) as stream:
            text = stream.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def check_seal(content: Mapping[str, Any]) -> None:
    """Raise ValueError where the hash is missing or is not that of `content`."""
    if SEAL not in content:
        raise ValueError(f"it does not carry its own hash ({SEAL})")
    try:
        right = _digest({key: value for key, value in content.items() if key != SEAL})
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if content[SEAL] != right:
        raise ValueError("its content is not what its own hash says: it was changed after it was written")


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a sealed file. Raises ValueError with the reason where it is not whole."""
    content = read_json_object(path)
    check_seal(content)
    return content


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. Raises OSError; also for a symbolic link, a directory, a pipe or a device, without
    waiting for any.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link, not a file", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def check_entries(entries: object) -> None:
    """Raise ValueError unless `entries` maps plain file names (no path, nothing hidden) to what
    `checkpoints.file_entry` says."""
    if not isinstance(entries, dict):
        raise ValueError("its list of files is not an object")
    for name, entry in entries.items():
        if not is_plain_name(name):
            raise ValueError(f"it lists {name[:100]!r}, which is not the plain name of a file beside it")
        if not _is_entry(entry):
            raise ValueError(f"its entry of {name} is not a SHA-256 and a number of bytes")


def check_file(path: Path, entry: Mapping[str, Any], hashed: bool = True) -> None:
    """Compare a file with its entry; not its hash, unless `hashed`. Raises ValueError with the reason."""
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != entry["bytes"]:
                raise ValueError(f"{path.name} has {size} bytes, not {entry['bytes']}")
            if hashed and hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                raise ValueError(f"the hash of {path.name} differs")
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except OSError as error:
        raise ValueError(f"{path.name} can't be read: {error.strerror or error}") from error


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file name of letters, digits, `.`, `_`, `-` that is not hidden: it cannot leave its
    directory.
    """
    return 0 < len(name) < 256 and name.isascii() and name[0] != "." and not set(name) - _NAME_CHARACTERS


_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    digest, size = entry.get("sha256"), entry.get("bytes")
    is_digest = isinstance(digest, str) and len(digest) == 64 and not set(digest) - set("0123456789abcdef")
    return is_digest and isinstance(size, int) and not isinstance(size, bool) and size >= 0


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands in it twice")
    return content
