"""Prepared data: a small JSON file that names the token directories and the tokenizer of a DataConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from escala.contract.errors import DataError
from escala.contract.records import write_json
from escala.contract.sealed import read_json_object
from escala.schema import PretrainConfig
from escala.tracking.lineage import fingerprint
from workloads.data.cache import TokenDirectory, TokenFile, check_directory
from workloads.data.mixture import BLOCK_SEQUENCES, block_shares


@dataclass(frozen=True)
class PreparedData:
    """Token directories with their weights, and the tokenizer. `open` it in every worker."""

    path: Path
    corpora: tuple[TokenDirectory, ...]
    weights: tuple[float, ...]
    tokenizer_path: Path | None  # None: token ids stand for no text
    vocab_size: int  # the largest token id + 1
    end_of_text: int | None
    corpus_fingerprint: str  # of the documents, in order, and the weights
    tokenizer_fingerprint: str
    evaluation_fingerprint: str  # of the held-out documents and the tokenizer (docs/theory D.1)

    @classmethod
    def open(cls, path: str | Path) -> PreparedData:
        """Read and check what `prepare` wrote. Raises DataError where anything is missing or damaged."""
        path = Path(path)
        try:
            data = read_json_object(path)
            if path.stem != fingerprint(data):
                raise ValueError("its content is not what its name says")
        except (OSError, ValueError) as error:
            raise DataError(
                f"The prepared data {path} can't be read: {error}.",
                "Delete that file; the next run writes it again.",
            ) from error
        root = path.parent.parent
        tokenizer_path = None if data["tokenizer"] is None else root / data["tokenizer"]
        if tokenizer_path is not None:
            check_directory(tokenizer_path.parent)
        return cls(
            path=path,
            corpora=tuple(TokenDirectory(root / name) for name in data["corpora"]),
            weights=tuple(data["weights"]),
            tokenizer_path=tokenizer_path,
            **{name: data[name] for name in ("vocab_size", "end_of_text")},
            **{
                f"{name}_fingerprint": data[f"{name}_fingerprint"]
                for name in ("corpus", "tokenizer", "evaluation")
            },
        )

    def _sum(self, split: str, what: str) -> int:
        return sum(getattr(getattr(corpus.manifest, split), what) for corpus in self.corpora)

    @property
    def train_tokens(self) -> int:
        """Unique training tokens, end-of-text included, over all corpora."""
        return self._sum("train", "tokens")

    @property
    def train_documents(self) -> int:
        """Training documents over all corpora."""
        return self._sum("train", "documents")

    @property
    def held_out_tokens(self) -> int:
        """Held-out tokens, end-of-text included, over all corpora."""
        return self._sum("held_out", "tokens")

    @property
    def held_out_bytes_per_token(self) -> float:
        """UTF-8 bytes of held-out text per token: nats per token / (ln 2 x this) are bits per byte. 0: no text."""
        return self._sum("held_out", "text_bytes") / max(1, self.held_out_tokens)

    def windows(self, context_tokens: int) -> list[int]:
        """Training windows of T + 1 tokens (overlapping in one) of each corpus."""
        return [max(0, corpus.manifest.train.tokens - 1) // context_tokens for corpus in self.corpora]

    def held_out(self, context_tokens: int, max_tokens: int) -> Tensor:
        """tokens_NT1 (int64, N sequences of T + 1 tokens): the held-out windows that every evaluation uses.

        Each corpus gives the head of its held-out text: its weight's share of `max_tokens`, or all it has.
        That is the same text at every T (but for whole windows), batch and number of ranks.

        Raises DataError where not one window fits.
        """
        parts = []
        for corpus, weight in zip(self.corpora, self.weights, strict=True):
            tokens = corpus.tokens("held_out")
            share = max(1, int(max_tokens * weight / sum(self.weights)) // context_tokens)
            count = min(share, max(0, len(tokens) - 1) // context_tokens)
            parts += [window_at(tokens, index, context_tokens) for index in range(count)]
        if not parts:
            raise DataError(
                f"The held-out text has {self.held_out_tokens} tokens: not one sequence of {context_tokens}.",
                "Raise data.held_out_fraction, give more text, or shorten training.context_tokens.",
            )
        return torch.from_numpy(np.stack(parts))


def write_record(root: Path, record: Mapping[str, Any]) -> Path:
    """Write the JSON that `PreparedData.open` reads, with paths relative to `root`, and return its path."""
    path = root / "prepared" / f"{fingerprint(record)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return path


def window_at(tokens: TokenFile, index: int, context_tokens: int) -> np.ndarray:
    """Window `index` of T + 1 tokens, int64: its last token is the next one's first."""
    start = index * context_tokens
    return tokens[start : start + context_tokens + 1].astype(np.int64)


def check(prepared: PreparedData, config: PretrainConfig) -> None:
    """Raise DataError where `config` can't train on this data: vocabulary, too few tokens, repeats."""
    if prepared.vocab_size > config.model.vocab_size:
        raise DataError(
            f"The tokenizer has {prepared.vocab_size} tokens, the model only {config.model.vocab_size}.",
            f"Set model.vocab_size to at least {prepared.vocab_size}, or use a smaller tokenizer.",
        )
    context = config.context_tokens
    prepared.held_out(context, config.training.evaluation_tokens)
    shares = [share / BLOCK_SEQUENCES for share in block_shares(prepared.weights)]
    sequences = config.total_steps * config.training.batch_sequences
    for number, (share, windows) in enumerate(zip(shares, prepared.windows(context), strict=True)):
        needed = max(1, int(config.training.batch_sequences * share))
        if windows < needed:
            raise DataError(
                f"data.corpora[{number}] has {windows} training sequences of {context} tokens; "
                f"one batch needs {needed}.",
                "Give more text, or lower training.batch_sequences or training.context_tokens.",
            )
        if not config.data.allow_repeats and sequences * share > windows:
            raise DataError(
                f"The run draws {sequences * share:.0f} sequences from data.corpora[{number}], "
                f"which has {windows}, and data.allow_repeats is false.",
                "Shorten the run, give more text, or set data.allow_repeats=true.",
            )
