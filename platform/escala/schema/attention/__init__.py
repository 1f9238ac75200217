"""Kinds of attention: a file each, its options and what they cost. `workloads.model.attention.KIND` computes it."""

from __future__ import annotations

from escala.schema.attention.kind import (
    KINDS,
    AttentionKind,
    AttentionSection,
    FeaturesConfig,
    ModelShape,
)
from escala.schema.kinds import import_kinds

__all__ = ["KINDS", "AttentionKind", "AttentionSection", "FeaturesConfig", "ModelShape"]

import_kinds(__name__, __path__)
