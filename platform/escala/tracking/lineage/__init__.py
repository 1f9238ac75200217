"""Fingerprints: what a run was made of. The same thing gives the same fingerprint on every machine, or an
error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from escala.contract.errors import SpecError

PACKAGES = ("escala", "workloads", "tune_spaces")


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: keys sorted, no spaces. Raises SpecError that names what has no one text
    (a set, an object, NaN, a key that is not a string).
    """
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 of `canonical_json(value)`, 64 hexadecimal digits. Raises SpecError."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value, where)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SpecError(f"{where} is {value}, which has no JSON", "leave it out, or use null")
        return value
    if isinstance(value, PurePath):
        return value.as_posix()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
    if hasattr(value, "model_dump"):  # pydantic, not imported for it
        return _plain(value.model_dump(), where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SpecError(f"{where} has the key {key!r}, which is not a string", "use strings as keys")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise SpecError(
        f"{where} is a {type(value).__name__}, which looks different each time", "use plain data (sort a set)"
    )


@dataclass(frozen=True)
class Code:
    """The code that runs here."""

    fingerprint: str  # of all sources of PACKAGES
    git_commit: str | None = None  # where they are a git checkout
    git_dirty: bool | None = None  # whether any tracked file differs from that commit


@lru_cache(maxsize=1)
def code_fingerprint() -> Code:
    """What code this process runs: read once."""
    roots = _places(PACKAGES[0])
    commit, dirty = _git(Path(roots[0])) if roots else (None, None)
    return Code(source_fingerprint(PACKAGES), commit, dirty)


def source_fingerprint(packages: Iterable[str]) -> str:
    """SHA-256 over all Python and YAML files of `packages`, with their names."""
    digest = hashlib.sha256()
    for root in (Path(place) for name in packages for place in _places(name)):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml") and p.is_file()):
            content = hashlib.sha256(path.read_bytes()).digest()
            digest.update(f"{root.name}/{path.relative_to(root).as_posix()}\0".encode() + content)
    return digest.hexdigest()


def _places(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec else []


def _git(directory: Path) -> tuple[str | None, bool | None]:
    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # Installed inside somebody else's checkout, their commit says nothing about our code.
        ask("ls-files", "--error-unmatch", "__init__.py")
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None
