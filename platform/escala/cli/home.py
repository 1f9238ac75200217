"""The home that a command works on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from escala.client import Escala


def open_home() -> Escala:
    """The door to the home that the environment names; once in a command, which reads the settings with it."""
    from escala.client import Escala

    return Escala()
