"""The files of a home's jobs, wherever they are: records by name."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any, TypeVar

from escala.contract.records import json_bytes, parse_record
from escala.storage.base import FileStore
from escala.storage.local import LocalFiles

T = TypeVar("T")


def open_files(home: Path) -> FileStore:
    """The store of the files of a home. Nothing is read or made."""
    return LocalFiles(home)


def read_stored(files: FileStore, kind: type[T], name: PurePath) -> T | None:
    """The record of type `kind` of this name; None where there is none, and where it is damaged: then it is set aside,
    with the reason in the log. Raises OSError where it cannot be read, VersionError for one of a newer format.
    """
    try:
        return parse_record(kind, files.read(name), str(files.local(name)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        files.set_aside(name, str(error))
        return None


def write_stored(files: FileStore, name: PurePath, value: Any) -> None:
    """Write a record, or plain data, as JSON. Raises OSError."""
    files.write(name, json_bytes(value))
