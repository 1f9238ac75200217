"""Where text and tokens come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from escala.schema.base import StoredPath, Strict


class TokenizerConfig(Strict):
    """Byte-level BPE trained on the corpus's training split, or a tokenizer.json given."""

    path: StoredPath | None = Field(None, description="a tokenizer.json; None: train one")
    vocab_size: int = Field(4096, ge=258, description="of the one to train")
    train_characters: int = Field(10_000_000, gt=0, description="how much of the corpus the training sees")


@dataclass(frozen=True)
class TextFiles:
    """The user's files by globs inside `root`."""

    root: str
    globs: list[str]


@dataclass(frozen=True)
class TextLines:
    """The user's file of JSON lines; each has its text at `text_key`."""

    path: str
    text_key: str


class CorpusSection(Strict):
    """One of `data.corpora`."""

    def needs(self) -> TextFiles | TextLines | None:
        """What must be there before a job is queued (`workloads.preflight` looks); None: none of the user's files."""
        return None


class PythonSourceCorpus(CorpusSection):
    """The Python standard library and a fixed list of core dependencies, whose versions are checked."""

    kind: Literal["python_source"] = "python_source"
    packages: list[str] | None = Field(None, description="a subset of the fixed list; None: all of it")
    weight: float = Field(1.0, gt=0, description="share of the sequences, relative to the other corpora")


class FilesCorpus(CorpusSection):
    """Text files by globs inside a stated root; one document a file."""

    kind: Literal["files"]
    root: StoredPath = Field(description="the directory that the globs start in")
    globs: list[str] = Field(["**/*.txt"], min_length=1, description="files to read")
    weight: float = Field(1.0, gt=0, description="share of the sequences, relative to the other corpora")

    def needs(self) -> TextFiles:
        """The files."""
        return TextFiles(self.root, self.globs)


class JsonlCorpus(CorpusSection):
    """JSON lines; one document a line."""

    kind: Literal["jsonl"]
    path: StoredPath = Field(description="the file")
    text_key: str = Field("text", description="key of a line's text")
    weight: float = Field(1.0, gt=0, description="share of the sequences, relative to the other corpora")

    def needs(self) -> TextLines:
        """The file."""
        return TextLines(self.path, self.text_key)


class HuggingFaceCorpus(CorpusSection):
    """A data set of the Hugging Face hub by name; needs `datasets` and, the first time, the network."""

    kind: Literal["huggingface"]
    name: str = Field(description="of the data set, as the hub has it")
    subset: str | None = Field(None, description="one of its configurations; None: the default one")
    split: str = Field("train", description="of the data set")
    text_key: str = Field("text", description="column of the text")
    revision: str | None = Field(None, description="a commit; recorded, so that the run can be repeated")
    weight: float = Field(1.0, gt=0, description="share of the sequences, relative to the other corpora")


Corpus = Annotated[
    PythonSourceCorpus | FilesCorpus | JsonlCorpus | HuggingFaceCorpus, Field(discriminator="kind")
]
_CORPORA: TypeAdapter[list[Corpus]] = TypeAdapter(list[Corpus])


def corpora_of(config: Mapping[str, Any]) -> list[Corpus]:
    """The corpora of a workload's configuration (as plain data); none where it has no such section."""
    return _CORPORA.validate_python((config.get("data") or {}).get("corpora") or [])


class DataConfig(Strict):
    """Where the tokens come from. With several corpora, each sequence is drawn from one of them by weight."""

    corpora: list[Corpus] = Field([PythonSourceCorpus()], min_length=1, description="where text comes from")
    tokenizer: TokenizerConfig = TokenizerConfig()
    held_out_fraction: float = Field(0.02, gt=0, lt=0.5, description="of documents, by hash of their content")
    max_characters: int | None = Field(None, gt=0, description="stop reading the corpus after so many")
    allow_repeats: bool = Field(True, description="False: refuse a run longer than one epoch of the data")
