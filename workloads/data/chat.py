"""A tokenizer with its chat template, as it travels with a model: texts and conversations to token ids and back.

Templates are rendered by transformers, in its sandboxed Jinja. A conversation is rendered whole, so that its ids are
those of transformers' `apply_chat_template`; answers are found in the text, not by gluing token lists together.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from escala.errors import DataError
from workloads.data.dialogues import ASSISTANT, Message, Prompt
from workloads.data.tokenizer import TextTokenizer, wrap

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Of a tokenizer that brings none: "User: ...", "Assistant: ..." and its end of text. No other control token."""


class ChatTokenizer:
    """A tokenizer and its template.

    Args:
        fast: transformers' tokenizer (PreTrainedTokenizerFast).
        name: for messages.

    Attributes:
        text: the tokenizer of plain texts, without the template.

    Raises DataError for one without an end-of-text token.
    """

    def __init__(self, fast: Any, name: str) -> None:
        self._fast = fast
        self.text: TextTokenizer = wrap(Tokenizer.from_str(fast.backend_tokenizer.to_str()), name)
        if fast.eos_token_id is None:
            fast.eos_token = self.text.tokenizer.id_to_token(self.text.end_of_text)
        if not fast.chat_template:
            fast.chat_template = PLAIN_TEMPLATE
        self.end_of_text = int(fast.eos_token_id)
        self.vocab_size = self.text.vocab_size
        self.fingerprint = self.text.fingerprint
        self._control = [t for t in fast.all_special_tokens if t]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with no special token: one that is spelled out gets ordinary tokens."""
        ids: list[int] = self.text.encode([text])[0].tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.text.decode(list(ids))

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids that a model continues: of a text, with the begin-of-text token where the tokenizer adds one; of
        messages, with the template's opening of an answer. Raises DataError as `conversation` does.
        """
        if not isinstance(prompt, str):
            return self._encode_rendered(self._render(prompt, opening=True)).ids
        ids: list[int] = self.text.tokenizer.encode(prompt, add_special_tokens=True).ids
        return ids[:-1] if ids and ids[-1] == self.end_of_text else ids

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them are answers: the assistant's words and the token that ends its
        turn.

        Raises DataError for a message that spells a control token out, for a template that cannot render the messages,
        and for one that writes earlier turns differently once later ones follow.
        """
        text = self._render(messages)
        spans = [self._span(messages, i, text) for i, m in enumerate(messages) if m["role"] == ASSISTANT]
        found = self._encode_rendered(text)
        is_answer = [
            any(start >= first and end <= last for first, last in spans) for start, end in found.offsets
        ]
        return found.ids, is_answer

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json with the template, as transformers reads them."""
        self._fast.save_pretrained(directory)

    def _span(self, messages: Sequence[Message], number: int, text: str) -> tuple[int, int]:
        """Where the answer of message `number` stands in the rendered text."""
        before = self._render(messages[:number], opening=True)
        after = self._render(messages[: number + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                "The chat template writes a turn differently once others follow, so answers can't be told apart.",
                "Split the conversation, one answer each, or use a template without that.",
            )
        return len(before), len(after.rstrip())

    def _render(self, messages: Sequence[Message], opening: bool = False) -> str:
        for message in messages:
            spelled = next((token for token in self._control if token in message["content"]), None)
            if spelled is not None:
                raise DataError(
                    f"A message spells out the control token {spelled}.",
                    "Remove it: it would end or open a turn.",
                )
        try:
            text: str = self._fast.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=opening
            )
        except Exception as error:
            raise DataError(
                f"The chat template can't render these messages: {error}.", "Check their roles and order."
            ) from error
        return text

    def _encode_rendered(self, text: str) -> Any:
        """With control tokens read as such: they are the template's."""
        return self._fast.backend_tokenizer.encode(text, add_special_tokens=False)


def load_chat_tokenizer(path: str | Path) -> ChatTokenizer:
    """The tokenizer in a directory in Hugging Face's layout, a tokenizer.json, or a .gguf file. Raises DataError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(path)
    if path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise DataError(f"{path} needs the package gguf.", "pip install 'escala[gguf]'")
        return ChatTokenizer(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), str(path))
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"There is no {file}.", "Give a tokenizer.json, or a directory that holds one.")
    try:
        if path.is_dir() and (path / "tokenizer_config.json").is_file():
            fast = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            fast = PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:
        raise DataError(
            f"{path} is no tokenizer: {error}.", "Save it with tokenizers or transformers."
        ) from error
    return ChatTokenizer(fast, str(path))
