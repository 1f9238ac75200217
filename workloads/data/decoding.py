"""What a tokenizer's decoder does at the beginning and in the middle of a text.

A SentencePiece decoder drops the blank before a text's first word. An answer is no beginning: it is decoded as what
follows a word, and keeps its blank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What stands for bytes that are no UTF-8 (Unicode's recommended practice)."""
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_ANCHORS = ("a", "A", "0", "x", "e", "1")


@dataclass(frozen=True)
class Decoding:
    """A tokenizer's decoder, as a stream has to know it.

    Attributes:
        specials: special tokens by id: no decoded text has them.
        byte_runs: neighbouring tokens <0x00> to <0xFF> are decoded together, all of them to U+FFFD where they are no
            UTF-8: their text is decided by the first token that is none.
        half_characters: bytes of one character may be in several tokens: U+FFFD at the end may yet become another.
        is_local: text that was decoded stays as it is, whatever comes.
        anchor: tokens of a word: what is decoded after them is no beginning. Empty where there is none.
        anchor_characters: of that word.
    """

    tokenizer: Tokenizer = field(repr=False)
    specials: Mapping[int, str]
    byte_runs: bool
    half_characters: bool
    is_local: bool
    anchor: tuple[int, ...]
    anchor_characters: int

    def text(self, ids: Sequence[int], continues: bool) -> str:
        """The text of `ids` without special tokens: a text of its own, or one that continues another."""
        if not continues or not self.anchor:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        both = str(self.tokenizer.decode([*self.anchor, *ids], skip_special_tokens=True))
        return both[self.anchor_characters :]

    def is_byte(self, token: int) -> bool:
        """Whether it is one of a run of bytes."""
        return self.byte_runs and _BYTE.fullmatch(self.tokenizer.id_to_token(token) or "") is not None


@lru_cache(maxsize=8)
def decoding_of(tokenizer: Tokenizer) -> Decoding:
    """What `tokenizer`'s decoder does. Tokens that are added to it afterwards are not known."""
    parts = list(_parts(_state(tokenizer.decoder)))
    kinds = {part["type"] for part in parts}
    added = tokenizer.get_added_tokens_decoder()
    specials = {number: token.content for number, token in added.items() if token.special}
    anchor = next(_anchors(tokenizer, specials), ())
    word = str(tokenizer.decode(list(anchor), skip_special_tokens=True))
    return Decoding(
        tokenizer,
        specials,
        byte_runs="ByteFallback" in kinds,
        half_characters="ByteLevel" in kinds,
        is_local=_is_local(parts),
        anchor=anchor,
        anchor_characters=len(word),
    )


def _state(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as it is in tokenizer.json."""
    return None if part is None else dict(json.loads(part.__getstate__()))


def _parts(state: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if state is None:
        return
    if state["type"] == "Sequence":
        for part in state["decoders"]:
            yield from _parts(part)
    else:
        yield state


def _is_local(parts: Sequence[dict[str, Any]]) -> bool:
    """Whether each part reads one token at a time, or, once all are one text, one character."""
    fused = False
    for part in parts:
        kind = part["type"]
        if kind in ("ByteLevel", "Fuse"):
            fused = True
        elif kind == "Replace":
            if fused and len(part["pattern"].get("String", "..")) > 1:
                return False
        elif kind == "Strip":
            if fused and part["stop"]:
                return False
        elif kind not in ("ByteFallback", "Metaspace", "WordPiece"):
            return False
    return True


def _anchors(tokenizer: Tokenizer, specials: Mapping[int, str]) -> Iterator[tuple[int, ...]]:
    """Tokens that decode to a word, and to it once more after themselves."""

    def decoded(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    candidates = [tokenizer.encode(letter, add_special_tokens=False).ids for letter in _ANCHORS]
    for ids in [*candidates, *([number] for number in range(tokenizer.get_vocab_size()))]:
        if not ids or any(token in specials or _is_byte(tokenizer, token) for token in ids):
            continue
        word = decoded(ids)
        twice = decoded([*ids, *ids])
        is_word = word.strip() == word != "" and REPLACEMENT not in twice
        if is_word and twice.startswith(word) and twice[len(word) :].strip() == word:
            yield tuple(ids)


def _is_byte(tokenizer: Tokenizer, token: int) -> bool:
    return _BYTE.fullmatch(tokenizer.id_to_token(token) or "") is not None


def without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, or a copy where it writes a blank before every text (SentencePiece's dummy prefix): the copy encodes
    what continues a text. It treats special tokens that are spelled out as text, as `tokenizer` does.
    """
    normalizer, pre_tokenizer = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    plain = {
        "normalizer": _plain_normalizer(normalizer),
        "pre_tokenizer": _plain_pre_tokenizer(pre_tokenizer),
    }
    if plain == {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}:
        return tokenizer
    copy = type(tokenizer).from_str(json.dumps(json.loads(tokenizer.to_str()) | plain))
    copy.encode_special_tokens = tokenizer.encode_special_tokens
    return copy


def _plain_normalizer(state: dict[str, Any] | None) -> dict[str, Any] | None:
    if state is None or state["type"] == "Prepend":
        return None
    if state["type"] != "Sequence":
        return state
    inner = [plain for part in state["normalizers"] if (plain := _plain_normalizer(part)) is not None]
    return {**state, "normalizers": inner}


def _plain_pre_tokenizer(state: dict[str, Any] | None) -> dict[str, Any] | None:
    if state is None:
        return None
    if state["type"] == "Sequence":
        return {**state, "pretokenizers": [_plain_pre_tokenizer(part) for part in state["pretokenizers"]]}
    if state["type"] == "Metaspace":
        return {**state, "prepend_scheme": "never"}
    if state["type"] == "ByteLevel":
        return {**state, "add_prefix_space": False}
    return state
