"""A disk of its own for a test, so small that it can be filled."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


class Disk:
    """A tmpfs at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Leave no byte free, and no name for a new file."""
        with self._ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        number = 0
        try:
            while True:
                (self.path / f"ballast-{number}").touch()
                number += 1
        except OSError:
            return

    def free(self) -> None:
        """Take it all away again."""
        for each in self.path.glob("ballast*"):
            each.unlink()


def mounted(path: Path) -> Disk:
    """A new small disk at `path`; skips the test where we may not mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=30", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    return Disk(path)
