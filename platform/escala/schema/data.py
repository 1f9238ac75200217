"""Where text and tokens come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from escala.schema.base import StoredPath, Strict


class TokenizerConfig(Strict):
    """Byte-level BPE trained on the corpus's training split, or a tokenizer.json given."""

    path: StoredPath | None = Field(None, description="a tokenizer.json; None: train one")
    vocab_size: int = Field(4096, ge=258, description="of the one to train")
    train_characters: int = Field(10_000_000, gt=0, description="how much of the corpus the training sees")


class PythonSourceCorpus(Strict):
    """The Python standard library and a fixed list of core dependencies, whose versions are checked."""

    kind: Literal["python_source"] = "python_source"
    packages: list[str] | None = Field(None, description="a subset of the fixed list; None: all of it")
    weight: float = Field(1.0, gt=0)


class FilesCorpus(Strict):
    """Text files by globs inside a stated root; one document a file."""

    kind: Literal["files"]
    root: StoredPath
    globs: list[str] = Field(["**/*.txt"], min_length=1)
    weight: float = Field(1.0, gt=0)


class JsonlCorpus(Strict):
    """JSON lines; one document a line."""

    kind: Literal["jsonl"]
    path: StoredPath
    text_key: str = "text"
    weight: float = Field(1.0, gt=0)


class HuggingFaceCorpus(Strict):
    """A data set of the Hugging Face hub by name; needs `datasets` and, the first time, the network."""

    kind: Literal["huggingface"]
    name: str
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"
    revision: str | None = Field(None, description="a commit; recorded, so that the run can be repeated")
    weight: float = Field(1.0, gt=0)


Corpus = Annotated[
    PythonSourceCorpus | FilesCorpus | JsonlCorpus | HuggingFaceCorpus, Field(discriminator="kind")
]


class DataConfig(Strict):
    """Where the tokens come from. With several corpora, each sequence is drawn from one of them by weight."""

    corpora: list[Corpus] = Field([PythonSourceCorpus()], min_length=1)
    tokenizer: TokenizerConfig = TokenizerConfig()
    held_out_fraction: float = Field(0.02, gt=0, lt=0.5, description="of documents, by hash of their content")
    max_characters: int | None = Field(None, gt=0, description="stop reading the corpus after so many")
    allow_repeats: bool = Field(True, description="False: refuse a run longer than one epoch of the data")
