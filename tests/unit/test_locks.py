"""Locks between processes: one holder, and a killed one frees its lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from escala.storage.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from escala.storage.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_has_one_holder_and_is_freed_when_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with locked(path, wait=False) as held:
            assert not held
        holder.kill()
    with locked(path) as held:
        assert held
    assert path.exists()


def test_a_lock_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no directory"), locked(tmp_path / "no directory" / "lock"):
        pass
