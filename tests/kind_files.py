"""A kind that a test adds as a user would: a file of its schema, and a file of what computes it."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from escala.schema.kinds import Kinds


@contextmanager
def kind_of_two_files(
    name: str, kinds: Kinds, files: Mapping[ModuleType, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The kind `name`, registered in `kinds` while the context lasts.

    Args:
        files: {package: the text of its module `name`}; the schema's package comes first.
    """
    for package, text in files.items():
        directory = tmp_path / package.__name__
        directory.mkdir()
        (directory / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(directory)])
    importlib.invalidate_caches()
    importlib.import_module(f"{next(iter(files)).__name__}.{name}")
    yield name
    del kinds[name]
    for package in files:
        sys.modules.pop(f"{package.__name__}.{name}", None)
