"""What all parts of the door share: the settings, read once."""

from __future__ import annotations

from escala.settings import Settings


class Home:
    """A home's settings.

    Args:
        settings: None: from the environment (ESCALA_*), read once.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = Settings() if settings is None else settings
