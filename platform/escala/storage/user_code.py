"""The user's own modules: those of the directory where `escala submit` is typed, or of `--code DIR`. They are copied
into HOME/code/DIGEST, by their content, so that every attempt of a job runs the code as it was submitted; the cluster's
nodes share the home. ESCALA_CODE names the copy to the processes of a job, which put it last on their path.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath

from escala.contract.errors import SpecError
from escala.storage.files import open_files

TAG = "escala.code"  # of a job: its copy's digest
VARIABLE = "ESCALA_CODE"
OURS = ("escala", "workloads", "tune_spaces")
MOST_FILES, MOST_BYTES = 5_000, 100_000_000
SKIPPED = ("__pycache__", "node_modules", "site-packages")


def directory(home: Path, digest: str) -> Path:
    """Where the processes of a job find a copy."""
    return open_files(home).local(_name(digest))


def _name(digest: str) -> PurePath:
    return PurePath("code", digest)


def snapshot(source: Path, home: Path, named: Collection[str] = ()) -> str:
    """Copy the modules of `source` into the home, unless they are there; the copy's digest.

    Args:
        named: folders to copy even if only their subfolders hold Python (packages without an __init__.py).

    Raises SpecError where `source` is no directory, cannot be read, or holds more than a person writes.
    """
    files = modules(source, named)
    digest = hashlib.sha256()
    contents = {}
    for name, path in files.items():
        contents[name] = content = _read(path)
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    found = digest.hexdigest()[:32]
    try:
        open_files(home).write_folder(_name(found), contents)
    except OSError as error:
        raise SpecError(
            f"{directory(home, found)} cannot be written: {error.strerror}", "make room, or set ESCALA_HOME"
        ) from None
    return found


def modules(source: Path, named: Collection[str] = ()) -> dict[str, Path]:
    """The files to copy, by their path inside: `*.py` of the directory itself, and its folders that hold Python, with
    all that is in them. escala's own packages, hidden folders and environments stay out. Raises SpecError.
    """
    if not source.is_dir():
        raise SpecError(
            f"there is no directory {source}", "give --code the directory that holds your modules"
        )
    found: dict[str, Path] = {}
    size = 0
    for path in _candidates(source, named):
        name, size = str(path.relative_to(source)), size + path.stat().st_size
        found[name] = path
        if len(found) > MOST_FILES or size > MOST_BYTES:
            raise SpecError(
                f"the modules in {source} are more than {MOST_FILES:,} files or {MOST_BYTES // 10**6} MB",
                "give --code a directory that holds your modules alone",
            )
    return found


def _candidates(source: Path, named: Collection[str]) -> Iterator[Path]:
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or entry.name in (*SKIPPED, *OURS):
            continue
        if entry.suffix == ".py" and entry.is_file():
            yield entry
        elif entry.is_dir() and entry.name.isidentifier() and not _is_venv(entry):
            yield from _inside(entry) if entry.name in named or any(entry.glob("*.py")) else ()


def _inside(package: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(package):
        kept = [f for f in folders if not f.startswith(".") and f not in SKIPPED]
        folders[:] = sorted(f for f in kept if not _is_venv(Path(folder) / f))
        for name in sorted(files):
            path = Path(folder) / name
            if path.suffix != ".pyc" and not name.startswith(".") and path.is_file():
                yield path


def _is_venv(folder: Path) -> bool:
    return (folder / "pyvenv.cfg").exists()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"{path} cannot be read: {error.strerror}", "make it readable, or move it away"
        ) from None
