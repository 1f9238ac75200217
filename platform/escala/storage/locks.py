"""Locks between processes on one machine: files that the kernel frees with their holder, however that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

POLL_SECONDS = 0.05


@contextmanager
def locked(path: Path, wait: bool = True, every: float = POLL_SECONDS) -> Iterator[bool]:
    """Hold the lock file `path`, which is made where it is missing and stays. Yields whether it is held: False, at
    once, where another holds it and `wait` is False. Raises OSError where it cannot be opened.

    A file system without such locks is refused: filelock's substitute there would outlive a killed holder.

    Args:
        every: seconds between two tries.
    """
    path.parent.stat()  # filelock would make it
    lock = FileLock(path, timeout=-1 if wait else 0, mode=0o600, poll_interval=every, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
