"""Files of JSON lines that several processes append to and anybody reads meanwhile: whole lines count, one that a
kill or a full disk cut short is none, and takes no other with it.

Standard library only.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from escala.contract import fields

log = logging.getLogger("escala.contract.files")
LONGEST_BYTES = 64 * 2**20  # of a line; a longer one is damage, and is skipped


def append(path: Path, lines: bytes) -> None:
    """Add whole lines, on the disk when this returns. Raises OSError; a part may be there then, which is no line."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        left = memoryview(b"\n" + lines if cut else lines)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole(path: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """Each whole line from `offset` on, without its end, and the offset after it. One that is too long is empty; a
    directory or a pipe in the file's place has none. Raises OSError.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
        log.warning("%s is no regular file, and is left out", path)
        return
    with path.open("rb") as file:
        file.seek(offset)
        while line := file.readline(LONGEST_BYTES):
            offset += len(line)
            if len(line) < LONGEST_BYTES or line.endswith(b"\n"):
                if not line.endswith(b"\n"):
                    return  # it may still be being written
                yield line[:-1], offset
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_BYTES)
                offset += len(line)
            if line:
                log.warning("a line of %s has more than %d bytes, and is left out", path, LONGEST_BYTES)
                yield b"", offset


def objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, a line each; empty where there is none. Other lines are left out."""
    try:
        return [found for line, _ in whole(path) if isinstance(found := _parsed(line), dict)]
    except FileNotFoundError:
        return []


def _parsed(line: bytes) -> Any:
    try:
        return fields.parse(line)
    except ValueError:
        return None
