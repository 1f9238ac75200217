"""Rollouts: how many replicas serve, and which weights they serve. Mathematics in docs/theory A.9 and B.5."""
