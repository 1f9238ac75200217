"""What every configuration class shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Strict(BaseModel):
    """Unknown keys fail; values are frozen once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


StoredPath = Annotated[str, AfterValidator(_absolute)]
"""A path as the user typed it, made absolute where it was typed: the driver runs in another directory."""
