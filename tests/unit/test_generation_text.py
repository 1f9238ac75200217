"""Text that streams: whole characters, stop strings across tokens, nothing lost and nothing said twice."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from workloads.data.tokenizer import train_tokenizer
from workloads.generation.text import TextStream

TOKENIZER: Tokenizer = train_tokenizer(["the cat sat on the mat", "é ü 日本 😀 done"] * 5, 300)


def streamed(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """(pieces of text, tokens used)."""
    stream, pieces = TextStream(TOKENIZER, stop), []
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
