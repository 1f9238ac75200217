"""Speculation in a generation engine: what drafts tokens, and how many (docs/theory A.9)."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from escala.schema.base import Strict, absolute_path

NGRAM, HISTORY = "ngram", "history"
DRAFT_TOKENS = 64


def _draft(written: str) -> str:
    return written if written in (NGRAM, HISTORY) else absolute_path(written)


class SpeculationConfig(Strict):
    """What drafts tokens. The text is the same to the last bit, whatever is set here."""

    draft: Annotated[str, AfterValidator(_draft)] = Field(
        description="ngram: what followed the same tokens earlier in prompt and answer; history: what followed them in "
        "this prompt's other responses, earlier ones and running ones; else the path of a small model with the same "
        "tokenizer, as `model` takes them"
    )
    tokens: int = Field(
        8,
        gt=0,
        le=DRAFT_TOKENS,
        description="to draft for one request in one step at most; fewer, or none, where they do not pay",
    )
