"""Where the answers stand in a rendered conversation: what the model has to write, and nothing else.

An answer begins where the generation prompt ends and goes through its end-of-turn token. A template that marks answers
itself ({% generation %}) is taken at its word. For others each answer is found by rendering parts of the conversation,
and, where what precedes it can't be rendered alone, by rendering the conversation with another text in the answer's
place. What can't be found so is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from escala.contract.errors import DataError
from workloads.data.messages import ASSISTANT, Message

Span = tuple[int, int]
PLACEHOLDER = "\ufdd2"
"""A text that no message has: a code point that Unicode keeps out of all texts."""

_PROBE: list[Message] = [{"role": "user", "content": "a"}]


@dataclass(frozen=True)
class SpanFinder:
    """Finds answers for one chat template.

    Args:
        render: messages, and whether with the generation prompt, to text. Raises DataError.
        special: matches special tokens.
        ends: the special tokens, spelled out, that end an answer.
        is_added: whether a piece of text is made of the tokenizer's added tokens and white space alone.
    """

    render: Callable[[list[Message], bool], str]
    special: re.Pattern[str]
    ends: frozenset[str]
    is_added: Callable[[str], bool]

    def find(self, text: str, messages: list[Message]) -> list[Span]:
        """(begin, end) in `text`, the rendered messages, of each answer, in order. Raises DataError."""
        numbers = [number for number, each in enumerate(messages) if each["role"] == ASSISTANT]
        spans = [self._span(text, messages, number) for number in numbers]
        for (_, before), (begin, _), number in zip(spans, spans[1:], numbers[1:], strict=False):
            if begin < before:
                raise _not_found(number, "its place is not after the answer before it")
        return spans

    def _span(self, text: str, messages: list[Message], number: int) -> Span:
        before = self._before(messages, number)
        through = self.render(messages[: number + 1], False)
        if before is not None and text.startswith(before) and text.startswith(through):
            return len(before), len(before) + len(self._turn(through[len(before) :]))
        start, stop = self._content(text, messages, number)
        if before is not None and text.startswith(before) and len(before) <= start:
            begin = len(before)
        else:
            begin = self._after_header(text, start, number)
        if text.startswith(through) and len(through) >= stop:
            return begin, stop + len(self._turn(text[stop : len(through)]))
        rest = text[stop:]
        spaces = len(rest) - len(rest.lstrip())
        ending = self.special.match(rest, spaces)
        return begin, stop + (ending.end() if ending and ending.group() in self.ends else 0)

    def _before(self, messages: list[Message], number: int) -> str | None:
        """What the model is given to write answer `number`; None where nothing precedes it that could be rendered."""
        if number == 0:
            return None
        try:
            return self.render(messages[:number], True)
        except DataError:  # a system message alone, for some templates
            return None

    def _turn(self, turn: str) -> str:
        """A turn through its end-of-turn token, without what follows it, which the model never has to write. Of
        several tokens at its end the first that ends an answer is the one.
        """
        last = [f for f in self.special.finditer(turn) if not self.special.sub("", turn[f.end() :]).strip()]
        ending = next((found for found in last if found.group() in self.ends), last[-1] if last else None)
        return turn[: ending.end()] if ending else turn

    def _content(self, text: str, messages: list[Message], number: int) -> Span:
        """Where the text of answer `number` stands."""
        other: list[Message] = [dict(each) for each in messages]
        other[number]["content"] = PLACEHOLDER
        changed = self.render(other, False)
        if changed.count(PLACEHOLDER) != 1:
            raise _not_found(number, "the template does not write its text once")
        after = len(changed) - changed.index(PLACEHOLDER) - 1
        start = _same(text, changed)
        same = _same(text[start:][::-1], changed[::-1])
        stop = len(text) - min(same, after)
        if start < changed.index(PLACEHOLDER) and text[start:stop].strip() == "":
            raise _not_found(number, "the template writes it differently where it is empty")
        return start, stop

    @cached_property
    def _header(self) -> str | None:
        """What the generation prompt adds to a conversation, in the place of special tokens that end the whole (Phi-3);
        None where it changes what precedes.
        """
        try:
            plain, asked = self.render(_PROBE, False), self.render(_PROBE, True)
        except DataError:
            return None
        same = _same_tokens(plain, asked, self.special)
        return None if self.special.sub("", plain[same:]).strip() else asked[same:]

    @cached_property
    def _lead(self) -> str:
        """What the template writes between the generation prompt and an only answer, as Qwen3's empty thoughts."""
        with_answer: list[Message] = [*_PROBE, {"role": ASSISTANT, "content": PLACEHOLDER}]
        try:
            text, asked = self.render(with_answer, False), self.render(_PROBE, True)
        except DataError:
            return ""
        return text[len(asked) : text.find(PLACEHOLDER)] if text.startswith(asked) else ""

    def _after_header(self, text: str, start: int, number: int) -> int:
        """Where the header before the answer's text at `start` ends: there the answer begins."""
        header, lead = self._header, self._lead
        if header is None:
            raise _not_found(number, "what precedes it is written differently there")
        if not header:
            return start - len(lead) if text[:start].endswith(lead) else start
        at = text.rfind(header, 0, start)
        between = text[at + len(header) : start]
        if at < 0 or not (between == lead or self.is_added(between)):
            raise _not_found(number, "it does not follow the template's generation prompt")
        return at + len(header)


def ends_of_turn(render: Callable[[list[Message], bool], str], tokens: Collection[str]) -> list[str]:
    """Those of `tokens` that a template writes right after an answer, the last and an earlier one. One that also opens
    a user's turn is not taken for the end of an earlier one. Empty where the template takes no such conversation.
    """
    first: list[Message] = [*_PROBE, {"role": ASSISTANT, "content": PLACEHOLDER}]
    more: list[Message] = [*first, *_PROBE, {"role": ASSISTANT, "content": "b"}]
    try:
        last, earlier = (render(messages, False).partition(PLACEHOLDER)[2] for messages in (first, more))
        opening = _opening(render, pattern_of(tokens))
    except DataError:
        return []
    found = [pattern_of(tokens).match(text.lstrip()) for text in (last, earlier)]
    return [
        ending.group() for ending in found if ending and (ending is found[0] or ending.group() not in opening)
    ]


def _opening(render: Callable[[list[Message], bool], str], token: re.Pattern[str]) -> str:
    """What opens a conversation's first user's turn, without what an assistant's first turn has as well but does not
    begin with: a default system prompt, which may end as answers do.
    """
    text = render([{"role": "user", "content": PLACEHOLDER}], False).partition(PLACEHOLDER)[0]
    try:
        other = render([{"role": ASSISTANT, "content": PLACEHOLDER}], False).partition(PLACEHOLDER)[0]
    except DataError:
        return text
    begin = re.match(rf"(?:{token.pattern}|\s)*", text)
    return (begin.group() if begin else "") + text[_same_tokens(text, other, token) :]


def pattern_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest that does."""
    longest_first = sorted(map(re.escape, texts), key=len, reverse=True)
    return re.compile("|".join(longest_first) or "(?!)")


def _same(one: str, other: str) -> int:
    """Length of the longest text that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _same_tokens(one: str, other: str, token: re.Pattern[str]) -> int:
    """As `_same`, but no token of `one` is cut."""
    same = _same(one, other)
    return next((found.start() for found in token.finditer(one) if found.start() < same < found.end()), same)


def _not_found(number: int, reason: str) -> DataError:
    return DataError(
        f"the answer in message {number + 1} is not found in what the chat template makes of the conversation: "
        f"{reason}. The template writes it differently in a longer one, or not at all.",
        "Shorten the conversation to one answer, or give the tokenizer a template that marks answers with "
        "{% generation %}.",
    )


def of_answers(spans: Sequence[Span], offsets: Sequence[Span]) -> list[bool]:
    """Which tokens, by their (start, stop) in the text, have a part in a span."""
    return [any(start < end and stop > begin for begin, end in spans) for start, stop in offsets]
