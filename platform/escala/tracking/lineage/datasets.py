"""What a run reads, for the tracker's column of data sets: named by its configuration, known by its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from escala.tracking.tracker import Dataset


def dataset_of(config: Mapping[str, Any], fingerprints: Mapping[str, str]) -> Dataset:
    """The data of a workload's configuration (as plain data).

    Args:
        fingerprints: of its corpus, tokenizer and evaluation set; the corpus's is the digest.
    """
    data = config.get("data") if isinstance(config.get("data"), Mapping) else None
    source = {key: config[key] for key in ("data", "prompts") if config.get(key) is not None}
    name = "+".join(_names(data or {}) or [PurePath(str(config.get("prompts") or "data")).name])
    profile = {f"{key}_fingerprint": value for key, value in fingerprints.items()}
    return Dataset(name, fingerprints["corpus"], source=source, profile=profile)


def _names(data: Mapping[str, Any]) -> list[str]:
    """The corpora of pretraining, or the file of examples."""
    if data.get("train"):
        return [PurePath(str(data["train"])).name]
    found = [_corpus(corpus) for corpus in data.get("corpora") or ()]
    return list(dict.fromkeys(found))


def _corpus(corpus: Mapping[str, Any]) -> str:
    place = corpus.get("name") or corpus.get("path") or corpus.get("root")
    return PurePath(str(place)).name if place else str(corpus.get("kind"))
