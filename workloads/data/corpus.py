"""Documents of the corpora of a DataConfig: in a fixed order, without exact duplicates, split by hash.

`python_source` and `files` are read in the order of a hash of each path, so that a prefix of them
(`max_characters`) is a fair sample and no alphabetical slice. Every corpus is read afresh each time: its
content, not its path or date, is its identity.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from escala.contract.errors import DataError
from escala.schema import (
    DataConfig,
    FilesCorpus,
    HuggingFaceCorpus,
    JsonlCorpus,
    PythonSourceCorpus,
    TextCorpus,
)

STANDARD_LIBRARY = "python"
PYTHON_SOURCE_VERSIONS = {
    "matplotlib": "3.11.2",
    "networkx": "3.6.1",
    "numpy": "2.4.6",
    "pandas": "3.1.1",
    "scipy": "1.17.1",
    "SQLAlchemy": "2.1.9",
}
"""Dependencies of escala at constraints.txt's versions: 54 MB with the standard library. torch is not among
them, since its Python files differ between its CPU and CUDA builds."""

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "testing"}
_GENERATED_PREFIXES = ("_sysconfigdata", "__config__")  # written at build time: they differ between machines

Named = tuple[str, str]  # (where a text comes from, for messages; the text)


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    text: str
    digest: bytes  # SHA-256 of its UTF-8 bytes
    held_out: bool


def read_documents(corpus: TextCorpus, config: DataConfig) -> Iterator[Document]:
    """The documents of one corpus.

    Empty texts and exact repetitions are left out. Reading stops after `config.max_characters` of each
    corpus. The split depends on a document's content alone, so copies in two corpora fall on the same side.

    Raises DataError where the source can't be read, or a text is not valid Unicode.
    """
    seen: set[bytes] = set()
    characters = 0
    for name, text in _source(corpus):
        if not text.strip():
            continue
        try:
            digest = hashlib.sha256(text.encode()).digest()
        except UnicodeEncodeError as error:
            raise DataError(f"{name} is not valid Unicode: {error}.", "Remove the lone surrogate.") from error
        if digest in seen:
            continue
        seen.add(digest)
        yield Document(text, digest, unit_interval(digest[:8]) < config.held_out_fraction)
        characters += len(text)
        if config.max_characters is not None and characters >= config.max_characters:
            return


def unit_interval(eight_bytes: bytes) -> float:
    """Eight hash bytes as a number in [0, 1)."""
    return int.from_bytes(eight_bytes, "big") / 2**64


def _source(corpus: TextCorpus) -> Iterator[Named]:
    """(name, text) of each raw document."""
    if isinstance(corpus, PythonSourceCorpus):
        return _python_source(corpus)
    if isinstance(corpus, FilesCorpus):
        return _files(corpus)
    if isinstance(corpus, JsonlCorpus):
        return _jsonl(corpus)
    return _hugging_face(corpus)


def _python_source(corpus: PythonSourceCorpus) -> Iterator[Named]:
    known = [STANDARD_LIBRARY, *PYTHON_SOURCE_VERSIONS]
    chosen = known if corpus.packages is None else corpus.packages
    unknown = sorted(set(chosen) - set(known))
    if unknown or not chosen:
        raise DataError(
            f"python_source has no package {', '.join(unknown) or 'chosen'}.",
            f"Choose among {', '.join(known)}, or leave `packages` out.",
        )
    check_versions([name for name in chosen if name != STANDARD_LIBRARY])
    files: dict[str, Path] = {}
    for package in sorted(set(chosen)):
        files |= _standard_library() if package == STANDARD_LIBRARY else _package_files(package)
    for name in _by_hash(files):
        yield name, _decode_python(files[name])


def check_versions(packages: Iterable[str]) -> None:
    """Raise DataError where an installed package is not of the version that `python_source` is defined by."""
    for package in packages:
        wanted = PYTHON_SOURCE_VERSIONS[package]
        try:
            found = importlib.metadata.version(package).partition("+")[0]  # "+cpu" changes no Python file
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != wanted:
            raise DataError(
                f"The corpus python_source holds {package} {wanted}, but {found} is installed: "
                "the text, and so every loss, would be another.",
                f'pip install "{package}=={wanted}", or name the packages to use in data.corpora[].packages.',
            )


def _is_source(path: PurePosixPath) -> bool:
    """A hand-written module that belongs to no test suite."""
    if path.suffix != ".py" or path.name.startswith(_GENERATED_PREFIXES) or ".." in path.parts:
        return False
    return not any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in path.parts[:-1])


def _standard_library() -> dict[str, Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in root.rglob("*.py"):
        inside = PurePosixPath(path.relative_to(root).as_posix())
        if _is_source(inside):
            found[f"{STANDARD_LIBRARY}/{inside}"] = path
    return found


def _package_files(package: str) -> dict[str, Path]:
    """Modules that the package's own RECORD lists (so nothing that somebody else put beside them)."""
    files = importlib.metadata.distribution(package).files or []
    return {
        f"{package}/{file.as_posix()}": Path(str(file.locate()))
        for file in files
        if _is_source(PurePosixPath(file.as_posix()))
    }


def _decode_python(path: Path) -> str:
    """The text of a module in the encoding that it declares (PEP 263)."""
    data = _read_bytes(path)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} can't be decoded: {error}.", "Reinstall the package it belongs to."
        ) from error


def _files(corpus: FilesCorpus) -> Iterator[Named]:
    root = Path(corpus.root).resolve()
    if not root.is_dir():
        raise DataError(f"The corpus root {corpus.root} is not a directory.", "Give data.corpora[].root.")
    files: dict[str, Path] = {}
    for pattern in corpus.globs:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise DataError(
                f"The glob {pattern!r} leaves the root {root}.", "Give globs relative to the root."
            )
        for path in root.glob(pattern):
            if not path.resolve().is_relative_to(root):
                raise DataError(
                    f"{path} is a link to {path.resolve()}, outside of the root {root}.",
                    "Copy the file into the root, or name the root that holds it.",
                )
            if path.is_file():
                files[path.relative_to(root).as_posix()] = path
    if not files:
        raise DataError(f"No file under {root} matches {', '.join(corpus.globs)}.", "Check root and globs.")
    for name in _by_hash(files):
        yield str(files[name]), _decode_utf8(files[name])


def _decode_utf8(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}).", "Convert it, or narrow the globs."
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} can't be read: {error.strerror}.", "Check the file and its permissions."
        ) from error


def _by_hash(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _jsonl(corpus: JsonlCorpus) -> Iterator[Named]:
    path = Path(corpus.path)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.", "Check data.corpora[].path.") from error
    with stream:
        for number, line in enumerate(stream, start=1):
            name = f"{path}, line {number}"
            if line.strip():
                yield name, _text_of(name, line, corpus.text_key)


def _text_of(name: str, line: bytes, key: str) -> str:
    """The text under `key` of one JSON line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
        raise DataError(f"{name} is not JSON: {error}.", "Correct or remove the line.") from error
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{name} has no text under the key {key!r}.", "Set data.corpora[].text_key.")
    return text


def _hugging_face(corpus: HuggingFaceCorpus) -> Iterator[Named]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"The corpus {corpus.name} needs the package `datasets`, which is not installed.",
            "pip install datasets",
        )
    datasets = importlib.import_module("datasets")
    try:
        rows = datasets.load_dataset(corpus.name, corpus.subset, split=corpus.split, revision=corpus.revision)
    except Exception as error:
        raise DataError(
            f"The data set {corpus.name} can't be loaded: {error}",
            "Check its name, subset, split and revision.",
        ) from error
    for number, row in enumerate(rows, start=1):
        text = row.get(corpus.text_key)
        if not isinstance(text, str):
            raise DataError(
                f"{corpus.name}, row {number} has no text under the key {corpus.text_key!r}.",
                f"Set data.corpora[].text_key to one of {', '.join(row)}.",
            )
        yield f"{corpus.name}, row {number}", text
