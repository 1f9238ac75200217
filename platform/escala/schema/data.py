"""Where text and tokens come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

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


class RecallCorpus(CorpusSection):
    """Documents of pairs (key, value) that are drawn, so that L(T) is known (docs/theory A.11). Keys are independent,
    p_r proportional to r^-exponent; each document has a random map of its own from keys to values.

    Token ids directly: keys 0 .. keys - 1, then values; no text, no end-of-text.
    """

    kind: Literal["recall"]
    keys: int = Field(1024, ge=2, le=65_536, description="K: different keys")
    values: int = Field(32, ge=2, le=65_536, description="V: different values")
    exponent: float = Field(
        1.5, ge=0, le=10, description="s of the keys' frequencies: p_r is proportional to r^-s"
    )
    seed: int = Field(0, ge=0, description="of all documents; the held-out ones are drawn from another")
    documents: int = Field(32_768, gt=0, le=10_000_000, description="for training; a run sees none twice")
    held_out_documents: int = Field(512, gt=0, le=1_000_000, description="for the held-out loss")
    document_tokens: int = Field(
        512,
        ge=2,
        le=10_000_000,
        description="of each document: a multiple of every context length of a sweep",
    )

    @property
    def vocab_size(self) -> int:
        """K + V."""
        return self.keys + self.values

    def check_context(self, context_tokens: int) -> None:
        """Raise ValueError unless windows of T tokens are whole pairs of one document, and one of them is held out."""
        if context_tokens % 2:
            raise ValueError(
                f"training.context_tokens {context_tokens} is odd, and a recall corpus has pairs: give an even one"
            )
        if self.document_tokens % context_tokens:
            raise ValueError(
                f"training.context_tokens {context_tokens} does not divide the recall corpus's document_tokens "
                f"{self.document_tokens}: windows would cross documents; give a multiple of every context length"
            )
        if self.held_out_documents * self.document_tokens < 2 * context_tokens:
            raise ValueError(
                f"the recall corpus has one held-out window of {context_tokens} tokens, and the last one has no next "
                "token: set data.corpora[0].held_out_documents to at least 2"
            )

    def check_length(self, context_tokens: int, sequences: int) -> None:
        """Raise ValueError where a run of `sequences` windows would see a document twice."""
        per_document = self.document_tokens // context_tokens
        windows = self.documents * per_document - 1  # the last one has no next token
        if sequences > windows:
            raise ValueError(
                f"the run reads {sequences} windows of {context_tokens} tokens and the recall corpus has {windows}; "
                "a document that comes back could be learned by heart, and L(T) would not hold: "
                f"set data.corpora[0].documents to at least {-(-(sequences + 1) // per_document)}"
            )

    @model_validator(mode="after")
    def _whole_pairs(self) -> RecallCorpus:
        if self.document_tokens % 2:
            raise ValueError(
                f"document_tokens {self.document_tokens} is odd, and a document is made of pairs"
            )
        return self


TextCorpus = PythonSourceCorpus | FilesCorpus | JsonlCorpus | HuggingFaceCorpus
Corpus = Annotated[TextCorpus | RecallCorpus, Field(discriminator="kind")]
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

    @property
    def texts(self) -> list[TextCorpus]:
        """The corpora of text."""
        return [corpus for corpus in self.corpora if not isinstance(corpus, RecallCorpus)]

    @property
    def recall(self) -> RecallCorpus | None:
        """The corpus of drawn pairs; None: the corpora are text."""
        first = self.corpora[0]
        return first if isinstance(first, RecallCorpus) else None

    @model_validator(mode="after")
    def _recall_alone(self) -> DataConfig:
        if not any(isinstance(corpus, RecallCorpus) for corpus in self.corpora):
            return self
        if len(self.corpora) > 1:
            raise ValueError(
                "a recall corpus is never mixed: its L(T) would not be that of the mixture; name it alone"
            )
        fields = type(self).model_fields
        for name in ("tokenizer", "held_out_fraction", "max_characters", "allow_repeats"):
            if getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"data.{name} is of text, and a recall corpus has none: leave it out (its own options are keys, "
                    "values, exponent, seed, documents, held_out_documents, document_tokens)"
                )
        return self
