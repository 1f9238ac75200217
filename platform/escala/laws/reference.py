"""`name@version`, and what this home already knows of it: ESCALA_HOME/laws/NAME/VERSION.json.

A version never changes, so its law.json is read from the tracker once. Which version is champion does change:
`champion.json` is written here by save, promote and list, and read again from the tracker with `--refresh`.
In the path of a query: neither mlflow nor pandas here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from escala.contract.errors import LawError
from escala.contract.files import set_aside, write_whole
from escala.contract.records import read_json, write_json
from escala.laws.law import Law
from escala.laws.provenance import FORMAT, upgraded

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Reference:
    """A law by name; without a version, its champion."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def parse(text: str) -> Reference:
    """NAME or NAME@VERSION. Raises LawError for anything else."""
    name, at, version = text.partition("@")
    if not NAME.fullmatch(name):
        raise LawError(f"'{text}' is no law's name.", "Use letters, digits, '.', '_' and '-', e.g. small-lm.")
    if not at:
        return Reference(name)
    number = version.removeprefix("v")
    if not number.isdecimal() or int(number) < 1:
        raise LawError(f"'{version}' is no version of a law.", f"Versions count from 1: {name}@1.")
    return Reference(name, int(number))


@dataclass(frozen=True)
class Stored:
    """A law as it was registered. `provenance`: by whom, when, from which runs, sources, code and data; nested JSON,
    see provenance.py.
    """

    name: str
    version: int
    law: Law
    provenance: dict[str, Any]

    @property
    def reference(self) -> str:
        """name@version."""
        return f"{self.name}@{self.version}"


class Cache:
    """The laws that this home has seen, of one tracker: another tracker's law of the same name is not this
    one.
    """

    def __init__(self, home: Path, tracker_uri: str) -> None:
        self._root = home / "laws"
        self._tracker = hashlib.sha256(tracker_uri.encode()).hexdigest()[
            :16
        ]  # an address may hold a password

    def get(self, name: str, version: int) -> Stored | None:
        """The law, or None where it was never read here."""
        provenance = self._read(name, f"{version}.provenance.json")
        if provenance is None:
            return None
        law = Law.from_json((self._root / name / f"{version}.json").read_text())
        return Stored(name, version, law, upgraded(provenance))

    def find(self, asked: Reference) -> Stored | None:
        """The law asked for, as far as this home knows: its version, or the champion when last read."""
        version = asked.version or self.champion(asked.name)
        return None if version is None else self.get(asked.name, version)

    def put(self, stored: Stored) -> None:
        """Keep a law. The provenance goes last: a law without one counts as absent."""
        directory = self._root / stored.name
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / f"{stored.version}.json", stored.law.to_json())
        provenance = {"format": FORMAT, **stored.provenance, "tracker": self._tracker}
        write_json(directory / f"{stored.version}.provenance.json", provenance)

    def champion(self, name: str) -> int | None:
        """The champion's version when last read; None where that is not known."""
        pointer = self._read(name, "champion.json")
        return None if pointer is None else int(pointer["version"])

    def champions(self) -> list[Stored]:
        """Every law that answers to its bare name here."""
        found = (self.find(Reference(p.parent.name)) for p in sorted(self._root.glob("*/champion.json")))
        return [stored for stored in found if stored is not None]

    def set_champion(self, name: str, version: int | None) -> None:
        """Remember the champion; None: there is none."""
        path = self._root / name / "champion.json"
        if version is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": version, "tracker": self._tracker})

    def _read(self, name: str, file: str) -> dict[str, Any] | None:
        """The JSON of a file that was written for this tracker; None where there is none."""
        path = self._root / name / file
        try:
            content = read_json(path)
        except FileNotFoundError:
            return None
        except ValueError as error:  # the tracker has it still
            set_aside(path, str(error))
            return None
        known = isinstance(content, dict) and content.pop("tracker", None) == self._tracker
        return content if known else None
