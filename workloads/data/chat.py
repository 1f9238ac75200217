"""Chat tokenizers: messages to token ids and which of them are answers, by the model's own template.

Templates are rendered by transformers in jinja's sandbox; no code of a model is run. A conversation's ids are those
of transformers' `apply_chat_template`. Text within a message that spells a special token out ("<|im_end|>") stays
text: such a conversation is cut at the template's own special tokens and the rest encoded without any. Added tokens
that a tokenizer does not call special (Qwen3's <think>) are what they are, also within a message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer

from escala.contract.errors import DataError
from escala.contract.records import write_json
from escala.tracking.lineage import fingerprint
from workloads.data.decoding import decoding_of, without_prefix
from workloads.data.ends import GENERATION_CONFIG, generation_config
from workloads.data.messages import ASSISTANT, Message, plain_messages
from workloads.data.spans import PLACEHOLDER, Span, SpanFinder, ends_of_turn, of_answers, pattern_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PromptLike = str | Sequence[Mapping[str, Any]]
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For tokenizers without a template: "User: ...\\nAssistant: ...<end of text>\\n"; no token beyond the usual ones."""

# Around a message's special tokens while the template is rendered: code points that Unicode keeps out of all texts.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_LEFT_OUT = (
    "backend",
    "is_local",
    "local_files_only",
)  # of tokenizer_config.json: about the machine, not the model
_MARKS = (_OPEN, _CLOSE, *PLACEHOLDER)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SEQUENCES = 2
"""Counts up where a conversation's or an answer's tokens, or which of them are learned, change: stored ones are stale.
"""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its chat template.

    Attributes:
        tokenizer: as it is in its file.
        template: jinja; PLAIN_TEMPLATE where the model has none.
        end_of_text: the tokenizer's own end (EOS), which ends a text.
        end_ids: all that end an answer, EOS first: also those of generation_config.json, and the template's end of
            turn. Engine, training and export share them.
        vocab_size: the largest token id + 1.
        fingerprint: SHA-256 of the tokenizer's JSON, as `workloads.data.tokenizer` has it; not of the template.
    """

    tokenizer: Tokenizer = field(repr=False, compare=False)
    template: str
    end_of_text: int
    end_ids: tuple[int, ...]
    vocab_size: int
    fingerprint: str
    _transformers: PreTrainedTokenizerFast = field(repr=False, compare=False)
    _plain: Tokenizer = field(repr=False, compare=False)  # knows no special token in a text
    _marked_up: Tokenizer = field(repr=False, compare=False)  # knows them; offsets are exact

    def encode(self, text: str) -> list[int]:
        """Token ids without special ones; a text that spells a special token out gets ordinary tokens."""
        return _ids(self._plain, text)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; `special` tokens are left out or shown."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def prompt(self, messages_or_text: PromptLike) -> list[int]:
        """What the model is given to continue.

        Messages go through the template with its generation prompt; a text is taken as it is, after a
        beginning-of-text token where the tokenizer's own post-processor puts one. Raises DataError.
        """
        if isinstance(messages_or_text, str):
            return self._leading + self.encode(messages_or_text)
        return self._prompt_ids(self._rendered(self._guarded(messages_or_text), prompt=True))

    def sequence(self, prompt: PromptLike, answer: str) -> tuple[list[int], list[bool]]:
        """A prompt with its answer, as token ids and which of them are the answer's, its end included.

        The one way to put the two together, for SFT, preferences, reward models and judges: `prompt`'s tokens, then
        what a policy draws to give the text `answer`, and nothing after its end. A text goes on without a blank of its
        own, and ends with EOS; a chat's answer goes through the template, where a blank that the template or the
        tokenizer writes before every answer, and that a policy's text has already, is not written twice. Raises
        DataError.
        """
        if isinstance(prompt, str):
            given, drawn = self.prompt(prompt), [*self._continuation(answer), self.end_of_text]
            return [*given, *drawn], [False] * len(given) + [True] * len(drawn)
        content = answer.removeprefix(self._lead)
        before = plain_messages(prompt, key="prompt")
        history = [number for number, each in enumerate(before) if each["role"] == ASSISTANT]
        ids, answers = self.conversation([*before, {"role": ASSISTANT, "content": content}], history)
        end = max((i for i, is_answer in enumerate(answers, start=1) if is_answer), default=len(ids))
        return ids[:end], answers[:end]

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], untrained: Collection[int] = ()
    ) -> tuple[list[int], list[bool]]:
        """Token ids of whole messages, and which are answers: every assistant's turn with its end-of-turn token.

        An answer begins where the generation prompt ends, so it is what the model has to write at that place. Spans
        are found in the rendered text (`workloads.data.spans`) and carried over by the tokenizer's offsets.

        Args:
            untrained: messages, counted from 0, that are no answers though the assistant's.

        Raises DataError for messages that are none, that the template refuses, or whose answers it rewrites so that
        they can't be found (a template that drops an earlier answer's reasoning).
        """
        guarded = self._guarded(messages)
        text = self._rendered(guarded)
        numbers = [number for number, each in enumerate(guarded) if each["role"] == ASSISTANT]
        spans = self._marked(guarded) if _GENERATION.search(self.template) else []
        if not spans or (untrained and len(spans) != len(numbers)):
            spans = self._finder.find(text, guarded)
        if untrained:
            spans = [span for span, number in zip(spans, numbers, strict=True) if number not in untrained]
        clean = [tuple(len(_unmarked(text[:at])) for at in span) for span in spans]
        ids, offsets = self._tokens(text)
        return ids, of_answers([(begin, end) for begin, end in clean], offsets)

    def ends_of_turn(self) -> list[int]:
        """The added tokens that the template writes right after an answer."""
        added = {token.content: n for n, token in self.tokenizer.get_added_tokens_decoder().items()}
        return [added[text] for text in ends_of_turn(self._render, [each for each in added if each.strip()])]

    @cached_property
    def identity(self) -> str:
        """A hash of all that sequences depend on: tokenizer, template, ends, and how they are made here."""
        names = {name: str(token) for name, token in self._transformers.special_tokens_map.items()}
        return fingerprint([self.fingerprint, self.template, names, self.end_ids, self._leading, SEQUENCES])

    def save(self, directory: str | Path) -> None:
        """Write what AutoTokenizer opens with equal ids: tokenizer.json, tokenizer_config.json, chat_template.jinja.
        With them generation_config.json, the ends of answers.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._transformers.save_pretrained(directory)
        # transformers' own has another hash: it adds what it needs, and every check of fingerprints would fail.
        (directory / "tokenizer.json").write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings = {key: value for key, value in settings.items() if key not in _LEFT_OUT}
        write_json(
            directory / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
        )
        write_json(directory / GENERATION_CONFIG, generation_config(list(self.end_ids)))

    @cached_property
    def _leading(self) -> list[int]:
        encoding = self.tokenizer.encode("a", add_special_tokens=True)
        first = next((i for i, special in enumerate(encoding.special_tokens_mask) if not special), 0)
        return list(encoding.ids[:first])

    @cached_property
    def _specials(self) -> dict[str, int]:
        added = self.tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return pattern_of(self._specials)

    def _guarded(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages, checked, with marks around the special tokens that their texts spell out."""
        return [
            {**message, "content": self._special.sub(rf"{_OPEN}\g<0>{_CLOSE}", _unmarked(content))}
            for message in plain_messages(list(messages))
            for content in [message["content"]]
        ]

    def _rendered(self, messages: list[Message], prompt: bool = False) -> str:
        """The template's text of whole messages. Raises DataError where it leaves a tool's message out."""
        text = self._render(messages, prompt)
        for number, message in enumerate(messages):
            if message["role"] != "tool":
                continue
            other = [*messages[:number], {**message, "content": PLACEHOLDER}, *messages[number + 1 :]]
            if PLACEHOLDER not in self._render(other, prompt):
                raise DataError(
                    f"message {number + 1}: the chat template does not write messages of the role 'tool'.",
                    "Remove the conversation, or use a tokenizer whose template knows tools.",
                )
        return text

    def _render(self, messages: list[Message], prompt: bool = False) -> str:
        try:
            return str(
                self._transformers.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # a template is a model's own program and raises what it likes
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the chat template refuses messages of {roles}: {error}.") from error

    def _marked(self, messages: list[Message]) -> list[Span]:
        """The spans that the template itself marks with {% generation %}."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotation leaves the spans out
        names = self._transformers.special_tokens_map
        _, spans = render([messages], chat_template=self.template, return_assistant_tokens_mask=True, **names)
        return [(int(begin), int(end)) for begin, end in spans[0]]

    @cached_property
    def _finder(self) -> SpanFinder:
        ends = frozenset(str(self.tokenizer.id_to_token(number)) for number in self.end_ids)
        added = pattern_of(token.content for token in self.tokenizer.get_added_tokens_decoder().values())
        return SpanFinder(
            self._render,
            pattern_of({*self._specials, *ends}),
            ends,
            lambda text: self._special.search(text) is None and not added.sub("", text).strip(),
        )

    @cached_property
    def _continuing(self) -> Tokenizer:
        return without_prefix(self._plain)

    def _continuation(self, text: str) -> list[int]:
        """Token ids of a text that continues another one."""
        return _ids(self._continuing, text)

    @cached_property
    def _lead(self) -> str:
        """The white space that the first answer to a prompt has before its text as a policy's response would have it:
        the template's ("Assistant: "), or the tokenizer's own blank.
        """
        asked = [{"role": "user", "content": "a"}]
        try:
            prompt = self.prompt(asked)
            ids, answers = self.conversation([*asked, {"role": ASSISTANT, "content": "b"}])
        except DataError:
            return ""
        if ids[: len(prompt)] != prompt:
            return ""
        drawn = [token for token, is_answer in zip(ids, answers, strict=True) if is_answer]
        lead, found, _ = decoding_of(self.tokenizer).text(drawn, continues=True).partition("b")
        return lead if found and not lead.strip() else ""

    def _tokens(self, marked: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered text and their offsets in it, marks left out."""
        text = _unmarked(marked)
        if _OPEN not in marked:
            encoding = _encoding(self._marked_up.encode_batch, text)
            return list(encoding.ids), list(encoding.offsets)
        ids, offsets, at = list[int](), list[tuple[int, int]](), 0
        for piece, special in self._pieces(marked):
            if special:
                ids.append(self._specials[piece])
                offsets.append((at, at + len(piece)))
            else:
                encoding = _encoding(self._plain.encode_batch, piece)
                ids += encoding.ids
                offsets += [(at + start, at + stop) for start, stop in encoding.offsets]
            at += len(piece)
        return ids, offsets

    def _prompt_ids(self, marked: str) -> list[int]:
        """The ids alone: offsets of a long text cost as much again, and hold other threads up."""
        if _OPEN not in marked:
            return _ids(self._marked_up, _unmarked(marked))
        pieces = self._pieces(marked)
        return [
            token
            for piece, special in pieces
            for token in ([self._specials[piece]] if special else self.encode(piece))
        ]

    def _pieces(self, marked: str) -> list[tuple[str, bool]]:
        """A rendered text cut at the template's own special tokens: (text without marks, whether it is one)."""
        if not self._cuts_cleanly:
            raise DataError(
                "a message spells a special token out, and this tokenizer can't encode a text in pieces.",
                "Remove the special token from the message.",
            )
        pieces, at, own = list[tuple[str, bool]](), 0, self._special
        for found in own.finditer(marked):
            if marked[found.end() : found.end() + 1] == _CLOSE:
                continue
            pieces += [(_unmarked(marked[at : found.start()]), False), (found.group(), True)]
            at = found.end()
        return [*pieces, (_unmarked(marked[at:]), False)]

    @cached_property
    def _cuts_cleanly(self) -> bool:
        """Whether encoding between special tokens one by one gives what encoding the whole gives."""
        for special, number in self._specials.items():
            whole = self._marked_up.encode(f"a b{special}c\n d{special}\n", add_special_tokens=False).ids
            parts = [self.encode(part) for part in ("a b", "c\n d", "\n")]
            if whole != [*parts[0], number, *parts[1], number, *parts[2]]:
                return False
        return True


def _unmarked(text: str) -> str:
    for mark in _MARKS:
        text = text.replace(mark, "")  # ten times as fast as str.translate on a long text
    return text


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids without special ones. Raises DataError."""
    return list(_encoding(tokenizer.encode_batch_fast, text).ids)


def _encoding(encode_batch: Callable[..., list[Encoding]], text: str) -> Encoding:
    """`text` by a tokenizer's method for many: it lets other threads run meanwhile, which `encode` does not.

    Raises DataError where the tokenizer fails, its library's panics included, which are no Exception.
    """
    try:
        return encode_batch([text], add_special_tokens=False)[0]
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # a panic is no Exception; of this text alone
        raise DataError(
            f"The tokenizer fails on a text of {len(text)} characters: {type(error).__name__}: "
            f"{str(error)[:200]}.",
            "Leave the text out, or give its token ids where they are taken.",
        ) from error
