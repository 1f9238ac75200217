"""Chat tokenizers: messages to token ids and which of them are answers, by the model's own template.

Templates are rendered by transformers in jinja's sandbox; no code of a model is run. A conversation's ids are those
of transformers' `apply_chat_template`. Text within a message that spells a special token out ("<|im_end|>") stays
text: such a conversation is cut at the template's own special tokens and the rest encoded without any. Added tokens
that a tokenizer does not call special (Qwen3's <think>) are what they are, also within a message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, processors

from escala.errors import DataError, NotFoundError
from escala.records import write_json
from workloads.data.tokenizer import KNOWN_ENDS, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, str]
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
_MARKS = str.maketrans("", "", _OPEN + _CLOSE)


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its chat template.

    Attributes:
        tokenizer: as it is in its file.
        template: jinja; PLAIN_TEMPLATE where the model has none.
        end_of_text: the id that ends an answer (EOS).
        vocab_size: the largest token id + 1.
        fingerprint: SHA-256 of the tokenizer's JSON, as `workloads.data.tokenizer` has it; not of the template.
    """

    tokenizer: Tokenizer = field(repr=False, compare=False)
    template: str
    end_of_text: int
    vocab_size: int
    fingerprint: str
    _transformers: PreTrainedTokenizerFast = field(repr=False, compare=False)
    _plain: Tokenizer = field(repr=False, compare=False)  # knows no special token in a text
    _marked_up: Tokenizer = field(repr=False, compare=False)  # knows them; offsets are exact

    def encode(self, text: str) -> list[int]:
        """Token ids without special ones; a text that spells a special token out gets ordinary tokens."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; `special` tokens are left out or shown."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def prompt(self, messages_or_text: Sequence[Message] | str) -> list[int]:
        """What the model is given to continue.

        Messages go through the template with its generation prompt; a text is taken as it is, after a
        beginning-of-text token where the tokenizer's own post-processor puts one. Raises DataError.
        """
        if isinstance(messages_or_text, str):
            return self._leading + self.encode(messages_or_text)
        return self._tokens(self._render(self._guarded(messages_or_text), prompt=True))[0]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of whole messages, and which are answers: every assistant's turn with its end-of-turn token.

        An answer begins where the generation prompt ends, so it is what the model has to write at that place. Spans
        are found in the rendered text and carried over by the tokenizer's offsets.

        Raises DataError for messages that are none, that the template refuses, or whose answers it rewrites so that
        they can't be found (a template that drops an earlier answer's reasoning).
        """
        guarded = self._guarded(messages)
        text = self._render(guarded)
        spans = [
            self._answer(text, guarded, number)
            for number, each in enumerate(guarded)
            if each["role"] == "assistant"
        ]
        ids, offsets = self._tokens(text)
        answers = [any(start < end and stop > begin for begin, end in spans) for start, stop in offsets]
        return ids, answers

    def save(self, directory: str | Path) -> None:
        """Write what AutoTokenizer opens with equal ids: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
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
        longest_first = sorted(map(re.escape, self._specials), key=len, reverse=True)
        return re.compile("|".join(longest_first) or "(?!)")

    def _guarded(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages, checked, with marks around the special tokens that their texts spell out."""
        guarded = []
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                raise DataError(f"message {number} is not an object of role and content: {message!r}.")
            role, content = message["role"], message["content"]
            if not isinstance(role, str) or not role.isidentifier() or not isinstance(content, str):
                raise DataError(f"message {number} has no plain role, or no text as content: {message!r}.")
            content = self._special.sub(rf"{_OPEN}\g<0>{_CLOSE}", content.translate(_MARKS))
            guarded.append({"role": role, "content": content})
        if not guarded:
            raise DataError("there is no message.")
        return guarded

    def _render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self._transformers.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
                )
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the chat template refuses messages of {roles}: {error}.") from error

    def _answer(self, text: str, messages: list[dict[str, str]], number: int) -> tuple[int, int]:
        """Where answer `number` is in the rendered text, marks left out: (begin, end)."""
        through = self._render(messages[: number + 1])
        content = messages[number]["content"].strip()
        if number:
            before = self._render(messages[:number], prompt=True)
            begin = len(before) if text.startswith(before) else -1
        else:  # nothing precedes it that could be rendered
            begin = text.find(content)
        if begin < 0:
            raise DataError(
                f"the chat template writes what precedes answer {number} differently in a longer one."
            )
        if text.startswith(through):
            turn = text[begin : len(through)]
        else:  # the last answer is written with more around it than an earlier one
            at = text.find(content, begin)
            if at < 0:
                raise DataError(f"the chat template rewrites answer {number} in a longer conversation.")
            rest = text[at + len(content) :]
            ending = self._special.match(rest.lstrip())
            spaces = len(rest) - len(rest.lstrip())
            turn = text[begin : at + len(content) + (spaces + ending.end() if ending else 0)]
        end = begin + len(self._without_tail(turn))
        return len(text[:begin].translate(_MARKS)), len(text[:end].translate(_MARKS))

    def _without_tail(self, turn: str) -> str:
        """A turn without the white space after its end-of-turn token, which the model never has to write."""
        ends = [found.end() for found in self._special.finditer(turn)]
        return turn[: ends[-1]] if ends and not turn[ends[-1] :].strip() else turn

    def _tokens(self, marked: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered text and their offsets in it, marks left out."""
        text = marked.translate(_MARKS)
        if _OPEN not in marked:
            encoding = self._marked_up.encode(text, add_special_tokens=False)
            return list(encoding.ids), list(encoding.offsets)
        ids, offsets, at = list[int](), list[tuple[int, int]](), 0
        for piece, special in self._pieces(marked):
            if special:
                ids.append(self._specials[piece])
                offsets.append((at, at + len(piece)))
            else:
                encoding = self._plain.encode(piece, add_special_tokens=False)
                ids += encoding.ids
                offsets += [(at + start, at + stop) for start, stop in encoding.offsets]
            at += len(piece)
        return ids, offsets

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
            pieces += [(marked[at : found.start()].translate(_MARKS), False), (found.group(), True)]
            at = found.end()
        return [*pieces, (marked[at:].translate(_MARKS), False)]

    @cached_property
    def _cuts_cleanly(self) -> bool:
        """Whether encoding between special tokens one by one gives what encoding the whole gives."""
        for special, number in self._specials.items():
            whole = self._marked_up.encode(f"a b{special}c\n d{special}\n", add_special_tokens=False).ids
            parts = [self.encode(part) for part in ("a b", "c\n d", "\n")]
            if whole != [*parts[0], number, *parts[1], number, *parts[2]]:
                return False
        return True


def load_chat_tokenizer(path: str | Path) -> ChatTokenizer:
    """The tokenizer and template in a Hugging Face directory, a tokenizer.json, or a .gguf file.

    One without a chat template gets PLAIN_TEMPLATE. A GGUF's is rebuilt by transformers, which does not know every
    pre-tokenizer: SmolLM2's splits of digits are lost, so numbers cost fewer tokens than in training.

    Raises NotFoundError, or DataError where there is no tokenizer, or none with an end-of-text token.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise NotFoundError(
            f"there is no tokenizer at {path}", "give a directory, a tokenizer.json or a .gguf file"
        )
    from transformers import PreTrainedTokenizerFast

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.suffix == ".gguf":
            theirs = PreTrainedTokenizerFast.from_pretrained(
                str(path.parent), gguf_file=path.name, local_files_only=True
            )
        elif path.is_dir():
            theirs = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        else:
            theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except ImportError as error:
        raise DataError(f"the tokenizer {path} can't be read: {error}.", "pip install gguf") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"there is no tokenizer that can be read at {path}: {error}.") from error
    rebuilt = theirs.backend_tokenizer.to_str()
    tokenizer = Tokenizer.from_str(rebuilt)
    if path.suffix != ".gguf" and file.is_file():
        own = Tokenizer.from_file(str(file))
        if own.get_vocab() == tokenizer.get_vocab():  # else tokenizer_config.json adds tokens
            tokenizer = own
    return _assemble(tokenizer, theirs, str(path))


def _assemble(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, name: str) -> ChatTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if theirs.eos_token is None:
        theirs.eos_token = next((token for token in KNOWN_ENDS if token in vocabulary), None)
    if theirs.eos_token not in vocabulary:
        raise DataError(
            f"The tokenizer {name} has no end-of-text token.",
            f"Name it in tokenizer_config.json (eos_token), or add one of {', '.join(KNOWN_ENDS)} to it.",
        )
    if not theirs.chat_template:
        theirs.chat_template = PLAIN_TEMPLATE
    plain, marked_up = (Tokenizer.from_str(tokenizer.to_str()) for _ in range(2))
    plain.encode_special_tokens = True
    for each in (plain, marked_up):
        each.post_processor = processors.Sequence([])  # ByteLevel's trims offsets
    return ChatTokenizer(
        tokenizer,
        str(theirs.get_chat_template()),
        vocabulary[theirs.eos_token],
        max(vocabulary.values()) + 1,
        tokenizer_fingerprint(tokenizer),
        theirs,
        plain,
        marked_up,
    )
