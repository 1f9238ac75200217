"""Files that another process relies on: written whole and to the disk, or not at all; set aside where damaged.

Standard library only.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

log = logging.getLogger("escala.contract.files")
NO_ROOM = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
)  # a full disk, a spent quota, a file-size limit
_WORDS = ("database or disk is full", "No space left on device", "Disk quota exceeded")  # SQLite's, others'
DAMAGED = ".damaged"  # at the end of the name of a file that was set aside


def no_room(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, says that there is no room on the disk."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        if any(words in str(error) for words in _WORDS):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, after a power cut too.

    Raises OSError; what was there before then stays.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a new file beside `path`, which takes `path`'s place at the end of the block; removed where
    the block, or that, fails.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def rename_whole(directory: Path, to: Path) -> None:
    """Rename `directory` to `to` once all that it holds is on the disk. Raises OSError as os.rename does."""
    for parent, _, names in os.walk(directory):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))
    os.rename(directory, to)
    sync(to.parent)


def sync(path: Path) -> None:
    """Return once `path`, a file or a directory, is on the disk. A file system that cannot say so is trusted."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def set_aside(path: Path, why: str) -> None:
    """Rename a damaged file to NAME.damaged, so that it is told once and another may be written in its place."""
    aside = path.with_name(path.name + DAMAGED)
    try:
        os.replace(path, aside)
    except OSError as error:
        log.warning("%s is damaged (%s), and cannot be set aside: %s", path, why, error)
        return
    log.warning("%s is damaged (%s); it is set aside as %s", path, why, aside.name)


def private_directory(path: Path) -> None:
    """Make `path`, for this user's eyes only, and what is above it as usual. One that is there, ours and empty
    is made private too. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077 and not any(path.iterdir()):
        path.chmod(0o700)


def make_private(path: Path) -> None:
    """Take others' rights to a file or directory of ours away, where there is one: an earlier version of escala, or a
    copy, may have left it open. A file system that cannot do that is trusted.
    """
    with suppress(OSError):
        found = path.lstat()
        if found.st_uid == os.getuid() and found.st_mode & 0o077 and not stat.S_ISLNK(found.st_mode):
            path.chmod(found.st_mode & 0o700)


def insist(act: Callable[[], T], what: str, every: float = 1.0) -> T:
    """`act()`, repeated every so many seconds until there is room on the disk for it; says so on stderr, once.
    What else it raises passes.
    """
    said = False
    while True:
        try:
            return act()
        except OSError as error:
            if not no_room(error):
                raise
            if not said:
                with suppress(OSError):
                    why = f"no room on the disk for {what} ({error.strerror})"
                    print(f"escala: {why}: waiting until there is", file=sys.stderr, flush=True)
            said = True
            time.sleep(every)


class _ForgivingFile(io.FileIO):
    """A file whose words are lost while the disk is full, rather than its writer."""

    def write(self, data: Any) -> int:
        """As FileIO.write."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if not no_room(error):
                raise
            return memoryview(data).nbytes


def forgiving_log(file: Path | int) -> TextIO:
    """A log to append to (a path or an open descriptor, which stays open). A full disk costs it lines and the
    program nothing.
    """
    raw = _ForgivingFile(file, "a", closefd=not isinstance(file, int))
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


def forgive_full_log() -> None:
    """Make this process outlive a full disk under its stdout and stderr, unless somebody captures them."""
    if sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__:
        sys.stdout, sys.stderr = forgiving_log(1), forgiving_log(2)
