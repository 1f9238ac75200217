"""Text that streams: whole characters, stop strings across tokens, nothing lost and nothing said twice."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from workloads.data.tokenizer import train_tokenizer
from workloads.generation.text import TextStream

TOKENIZER: Tokenizer = train_tokenizer(["the cat sat on the mat", "é ü 日本 😀 done"] * 5, 300)


PIECES = [
    "<unk>",
    "</s>",
    "<|end|>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *("▁", "▁▁", "a", "b", "▁Paris", " x", "\ufffd", "##d"),
]
DECODERS = {
    "llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(),
    "suffixes": decoders.BPEDecoder("d"),  # the last token is decoded otherwise than an earlier one
    "late": decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "Z")]),
    "none": None,
}


def with_decoder(name: str) -> Tokenizer:
    """A tokenizer of PIECES."""
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    if DECODERS[name] is not None:
        tokenizer.decoder = DECODERS[name]
    tokenizer.add_special_tokens(["<unk>", "</s>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


TOKENIZERS = {name: with_decoder(name) for name in DECODERS}


def streamed(
    tokens: list[int], stop: tuple[str, ...] = (), tokenizer: Tokenizer = TOKENIZER, continues: bool = False
) -> tuple[list[str], int]:
    """(pieces of text, tokens used)."""
    stream, pieces = TextStream(tokenizer, stop, continues), []
    for used, token in enumerate(tokens, 1):
        pieces.append(stream.push(token))
        if stream.stopped:
            return [*pieces, stream.finish()], used
    return [*pieces, stream.finish()], len(tokens)


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="the catéü日😀 ", max_size=30), st.integers(0, 5))
def test_pieces_make_the_text_even_cut_within_a_character(text: str, cut: int) -> None:
    tokens = TOKENIZER.encode(text).ids
    tokens = tokens[: max(0, len(tokens) - cut)]
    pieces, _ = streamed(tokens)
    assert "".join(pieces) == TOKENIZER.decode(tokens)
    assert all("\ufffd" not in piece for piece in pieces[:-1])  # half a character only at the very end


@settings(max_examples=80, deadline=None)
@given(
    st.text(alphabet="abc", max_size=24),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=2),
)
def test_stop_strings_end_the_text_at_the_first_one_to_complete(text: str, stops: list[str]) -> None:
    tokens = [TOKENIZER.token_to_id(letter) for letter in text]
    pieces, used = streamed(tokens, tuple(stops))
    prefixes = [text[:n] for n in range(len(text) + 1)]
    ended = next((p for p in prefixes if any(stop in p for stop in stops)), None)
    if ended is None:
        assert ("".join(pieces), used) == (text, len(tokens))
    else:
        assert "".join(pieces) == ended[: min(ended.find(s) for s in stops if s in ended)]
        assert used == len(ended)


def test_a_stop_string_spans_tokens_and_no_part_of_it_is_ever_sent() -> None:
    tokens = TOKENIZER.encode("the cat sat").ids
    assert len(tokens) > 2
    pieces, used = streamed(tokens, ("e c",))
    assert "".join(pieces) == "th"
    assert used < len(tokens)
    pieces, _ = streamed(tokens, ("e cow",))
    assert "".join(pieces) == "the cat sat"


def test_special_tokens_have_no_text() -> None:
    tokens = [*TOKENIZER.encode("the").ids, TOKENIZER.token_to_id("<|endoftext|>")]
    assert "".join(streamed(tokens)[0]) == "the"


def test_text_before_a_stop_string_that_never_completes_is_given_at_the_end() -> None:
    pieces, _ = streamed([TOKENIZER.token_to_id(letter) for letter in "abab"], ("abac",))
    assert pieces == ["", "", "", "ab", "ab"]


LIKELY = [*(3 + byte for byte in "你é😀\n".encode()), 3 + 0xFF, *range(259, len(PIECES)), 0, 1, 2]
SOME_TOKENS = st.lists(st.one_of(st.sampled_from(LIKELY), st.integers(0, len(PIECES) + 3)), max_size=12)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=60, deadline=None)
@given(tokens=SOME_TOKENS)
@example(tokens=[3, len(PIECES) + 3, 3 + 0xE4])  # an id of no token parts no run of bytes
def test_pieces_are_the_decoders_text_whatever_the_tokens(name: str, tokens: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    assert "".join(streamed(tokens, (), tokenizer)[0]) == tokenizer.decode(tokens)
    word = tokenizer.token_to_id("a")
    after = tokenizer.decode([word, *tokens])[len(tokenizer.decode([word])) :]
    if name != "suffixes":  # there "a" has a blank after it only where it isn't the last
        assert "".join(streamed(tokens, (), tokenizer, continues=True)[0]) == after
    assert "".join(streamed(tokens, ("no such text",), tokenizer)[0]) == tokenizer.decode(tokens)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=60, deadline=None)
@given(
    tokens=SOME_TOKENS,
    stop=st.sampled_from(["a", " Paris", "</s>", "b</s>", "<|end|>", "你", "</s><|end|>a"]),
)
def test_a_stop_string_ends_the_text_before_it(name: str, tokens: list[int], stop: str) -> None:
    tokenizer = TOKENIZERS[name]
    pieces, used = streamed(tokens, (stop,), tokenizer)
    text, whole = "".join(pieces), tokenizer.decode(tokens[:used])
    assert stop not in text
    assert whole.startswith(text)
    if used == len(tokens) and text == whole:
        assert stop not in whole


@pytest.mark.parametrize(
    ("stop", "text", "used"),
    [
        (("</s>",), "ab", 3),
        (("b</s>",), "a", 3),
        (("</s><|end|>",), "ab", 4),
        (("<|end|>a",), "ab", 5),
        (("ba",), "a", 5),  # in the text that is returned they are neighbours
        (("d|>",), "ab", 4),
        (("</s>a",), "aba", 5),
    ],
)
def test_a_stop_string_may_spell_special_tokens_out(stop: tuple[str, ...], text: str, used: int) -> None:
    tokenizer = TOKENIZERS["gemma"]
    tokens = [tokenizer.token_to_id(piece) for piece in ("a", "b", "</s>", "<|end|>", "a")]
    pieces, found = streamed(tokens, stop, tokenizer)
    assert ("".join(pieces), found) == (text, used)


def test_a_stop_string_in_a_run_of_bytes_ends_it_at_once() -> None:
    tokenizer = TOKENIZERS["llama"]
    tokens = [tokenizer.token_to_id(piece) for piece in ("a", "<0x0A>", "b")]
    assert streamed(tokens, ("\n",), tokenizer) == (["a", "", ""], 2)
