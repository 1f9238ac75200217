"""Kinds of generation engines: a file each, its limits. `workloads.generation.engines.KIND` makes one."""

from __future__ import annotations

from escala.schema.engines.kind import KINDS, EngineKind, EngineSection
from escala.schema.kinds import import_kinds

__all__ = ["KINDS", "EngineKind", "EngineSection"]

import_kinds(__name__, __path__)
