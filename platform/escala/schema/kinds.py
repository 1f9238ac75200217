"""Sections whose `kind` names their class, found in a registry: a kind is a file of its own, and nothing else tests
its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SerializationInfo
from pydantic_core import PydanticKnownError, core_schema

from escala.schema.base import Strict


class KindSection(Strict):
    """A section that names its kind."""

    kind: str


K = TypeVar("K", bound=KindSection)


class Kinds(dict[str, type[K]], Generic[K]):
    """Name -> class of one sort of section. `Annotated[Base, KINDS]` is a field that holds any of them, also one that
    was added after the field was defined.

    Args:
        default: the kind of a section that names none. A section of it is written as before there were kinds: without
            `kind`; one without any option, of whatever kind, may be written as the kind's name alone.
    """

    def __init__(self, default: str | None = None) -> None:
        super().__init__()
        self.default = default

    def add(self, kind: type[K]) -> type[K]:
        """Register a class by its `kind`. Raises ValueError for a name that another one has."""
        (name,) = get_args(kind.model_fields["kind"].annotation)  # a Literal
        if name in self:
            raise ValueError(f"{self[name].__name__} and {kind.__name__} are both of kind {name!r}")
        self[name] = kind
        return kind

    def read(self, value: Any) -> K:
        """The section that a user wrote. Raises pydantic.ValidationError, or its parts inside of another validation."""
        if isinstance(value, KindSection) and self.get(value.kind) is type(value):
            return value
        if isinstance(value, str) and self.default is not None:
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise PydanticKnownError("dict_type")
        name = value.get("kind", self.default)
        if name is None:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
        if not isinstance(name, str) or name not in self:
            known = ", ".join(map(repr, self))
            facts = {"discriminator": "'kind'", "tag": str(name)[:60], "expected_tags": known}
            raise PydanticKnownError("union_tag_invalid", facts)
        return self[name].model_validate({"kind": name, **value})

    def write(self, section: K, info: SerializationInfo) -> Any:
        """The section as plain data."""
        plain = section.model_dump(mode=info.mode)
        if self.default is None:
            return plain
        if len(plain) == 1:
            return section.kind
        return {k: v for k, v in plain.items() if k != "kind" or v != self.default}

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(self.write, info_arg=True)
        return core_schema.no_info_plain_validator_function(self.read, serialization=written)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(kind.__pydantic_core_schema__) for kind in self.values()]}


def import_kinds(package: str, path: Iterable[str]) -> None:
    """Import each module of a package: a kind registers itself as its module is read."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
