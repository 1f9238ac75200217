"""Rollouts: how many replicas serve, and which weights they serve. Mathematics in SPEC.md A.9 and B.5."""
