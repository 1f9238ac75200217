"""Byte-level BPE, trained on the corpus or given as tokenizer.json; its JSON's hash is its name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from escala.contract.errors import DataError

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


# How ByteLevel cuts an ASCII text into words (GPT-2's pattern); no token crosses a cut. Others go through
# the library: Python's tables of letters are of another Unicode version than its own.
_ASCII_WORDS = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
)
_REMEMBERED_WORDS = 2_000_000  # about 400 MB at most


class _WordTokens(dict[str, bytes]):
    """Each word's tokens as uint32 bytes, tokenised when first met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> bytes:
        if len(self) >= _REMEMBERED_WORDS:
            self.clear()
        ids = self._tokenizer.encode(word, add_special_tokens=False).ids
        self[word] = tokens = np.asarray(ids, dtype=np.uint32).tobytes()
        return tokens


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer, its end-of-text token and its fingerprint."""

    tokenizer: Tokenizer
    end_of_text: int
    vocab_size: int  # the largest token id + 1
    fingerprint: str
    _words: _WordTokens | None = field(repr=False, compare=False)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: of a model without a chat template its end of text."""
        return (self.end_of_text,)

    def encode(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        """Token ids of each text. A text that spells a special token out gets ordinary tokens.

        For a tokenizer like those we train, ASCII texts are looked up word by word: three times as fast.
        """
        by_word = [self._words is not None and text.isascii() for text in texts]
        others = [text for text, looked_up in zip(texts, by_word, strict=True) if not looked_up]
        encodings = iter(self.tokenizer.encode_batch_fast(others, add_special_tokens=False))
        return [
            self._by_word(text) if looked_up else np.asarray(next(encodings).ids, dtype=np.uint32)
            for text, looked_up in zip(texts, by_word, strict=True)
        ]

    def _by_word(self, text: str) -> npt.NDArray[np.uint32]:
        if self._words is None:
            raise TypeError("this tokenizer does not cut texts into words")
        tokens = b"".join(map(self._words.__getitem__, _ASCII_WORDS.findall(text)))
        return np.frombuffer(tokens, dtype=np.uint32)

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(tokens))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens: END_OF_TEXT, 256 bytes, merges. No text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer in a tokenizer.json.

    Raises DataError where the file is none, or has no end-of-text token under one of the usual names.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"The tokenizer {path} can't be read: {error.strerror}.", "Check its path."
        ) from error
    except Exception as error:
        raise DataError(f"{path} is not a tokenizer.json: {error}.", "Save it with `tokenizers`.") from error
    return wrap(tokenizer, str(path))


def wrap(tokenizer: Tokenizer, name: str) -> TextTokenizer:
    """`tokenizer` made ready for whole documents; `name` is for messages."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a file that quotes "<|endoftext|>" must not end the document
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    end = next((vocabulary[token] for token in KNOWN_ENDS if token in vocabulary), None)
    if end is None:
        raise DataError(
            f"The tokenizer {name} has no end-of-text token.", f"Add one of {', '.join(KNOWN_ENDS)} to it."
        )
    words = _WordTokens(tokenizer) if _cuts_into_words(tokenizer) else None
    return TextTokenizer(
        tokenizer, end, max(vocabulary.values()) + 1, tokenizer_fingerprint(tokenizer), words
    )


def _cuts_into_words(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is one that `train_tokenizer` makes: words, then BPE, nothing else."""
    parts = json.loads(tokenizer.to_str())
    words, model = parts["pre_tokenizer"] or {}, parts["model"]
    if parts["normalizer"] is not None or words.get("type") != "ByteLevel" or model["type"] != "BPE":
        return False
    if not all(token["special"] for token in parts["added_tokens"]):
        return False  # the library finds such tokens across words
    return bool(words["use_regex"]) and not words["add_prefix_space"] and not model["dropout"]


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's JSON with sorted keys."""
    canonical = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
