"""The tokens that end an answer, as a model's files say: several (Llama 3 has three), not the tokenizer's EOS alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from escala.contract.errors import DataError
from escala.schema.gguf_header import read_gguf_header

GENERATION_CONFIG = "generation_config.json"
_GGUF_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def generation_ends(path: Path) -> list[int]:
    """What generation ends at by the files of the model at `path`: a Hugging Face directory's generation_config.json,
    or its config.json where there is none (as transformers does); a .gguf file's header. Empty where they say nothing.

    Raises DataError for ids that are none.
    """
    if path.suffix == ".gguf" and path.is_file():
        try:
            metadata = read_gguf_header(path).metadata
        except ValueError as error:
            raise DataError(f"{error}.") from error
        found = (metadata.get(f"tokenizer.ggml.{name}") for name in _GGUF_ENDS)
        return [number for number in found if isinstance(number, int)]
    for name in (GENERATION_CONFIG, "config.json"):
        if (path / name).is_file():
            return _ids(path / name)
    return []


def generation_config(ends: list[int]) -> dict[str, Any]:
    """generation_config.json's content: transformers and vLLM end an answer at each of `ends`."""
    return {"eos_token_id": ends}


def _ids(file: Path) -> list[int]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} can't be read: {error}.", "Correct it, or take it away.") from error
    value = content.get("eos_token_id") if isinstance(content, dict) else None
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in ids):
        raise DataError(
            f"{file}: eos_token_id is {value!r}, which is no token id and no list of them.", "Correct it."
        )
    return ids
