"""Kinds of rewards: a file each, its options and what it needs. `workloads.rewards.KIND` computes it."""

from __future__ import annotations

from escala.schema.kinds import import_kinds
from escala.schema.rewards.kind import KINDS, Needs, RewardConfig, RewardKind

__all__ = ["KINDS", "Needs", "RewardConfig", "RewardKind"]

import_kinds(__name__, __path__)
