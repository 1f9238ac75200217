"""Drafted tokens for the engine: what drafts them, and how many of them pay (docs/theory A.9)."""
