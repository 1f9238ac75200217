"""What all views share."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class View(BaseModel):
    """A frozen answer. `of` reads the fields of the same names from a record."""

    model_config = ConfigDict(frozen=True, from_attributes=True, extra="forbid")

    @classmethod
    def of(cls, record: Any) -> Self:
        """The view of a record."""
        return cls.model_validate(record)
