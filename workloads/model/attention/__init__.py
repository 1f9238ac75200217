"""Kinds of attention: `make_attention(config)` is the module of a model's kind."""

from workloads.model.attention.registry import make_attention

__all__ = ["make_attention"]
