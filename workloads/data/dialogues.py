"""Prompts and their answers in JSON lines: what supervised fine-tuning trains on, and what preferences share with it.

A prompt is a text, or a chat: a list of messages {"role", "content"} that does not end with the assistant. A line is
`prompt` and `completion`, or `messages` (one chat, whose assistant messages are the answers, but for those of
`weight` 0). Which keys messages may have: `workloads.data.messages`. Other keys may stand on a line, since public data
sets carry many; those that would change what is read (tools, a system prompt, ...) are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from escala.contract.errors import DataError
from workloads.data.corpus import unit_interval
from workloads.data.messages import (
    ASSISTANT,
    Message,
    plain_messages,
    refuse_line_keys,
    text_at,
    untrained,
)

Prompt = str | list[Message]


class Prompted(Protocol):
    """An example that answers a prompt."""

    @property
    def prompt(self) -> Prompt:
        """What is answered."""
        ...


P = TypeVar("P", bound=Prompted)


@dataclass(frozen=True)
class TextCompletion:
    """A text and its continuation, outside of any chat."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A chat, of one turn or more, that ends with an answer; every assistant message is one.

    Attributes:
        untrained: the answers, counted among the messages from 0, that are read and not trained on.
    """

    messages: list[Message]
    untrained: frozenset[int] = frozenset()

    @property
    def prompt(self) -> list[Message]:
        """The messages before the first answer."""
        first = next(i for i, message in enumerate(self.messages) if message["role"] == ASSISTANT)
        return self.messages[:first]


Dialogue = TextCompletion | Chat


def read_dialogues(path: Path) -> Iterator[Dialogue]:
    """The examples of a JSONL file, in its order; a chat prompt with a completion becomes a Chat.

    Raises DataError, with file and line, where a line is not one, and where there is none.
    """
    for where, record in read_lines(path):
        yield _dialogue(where, record)


def _dialogue(where: str, record: dict[str, Any]) -> Dialogue:
    if record.get("label") is False:
        raise DataError(f"{where}: `label` is false: the answer is a bad one.", "Remove the line.")
    if record.get("messages") is not None:
        return _chat(where, record)
    prompt, completion = prompt_of(where, record), text_of(where, record, "completion")
    if isinstance(prompt, str):
        return TextCompletion(prompt, completion)
    return Chat([*prompt, {"role": ASSISTANT, "content": completion}], answers_in(prompt))


def _chat(where: str, record: dict[str, Any]) -> Chat:
    messages = plain_messages(record["messages"], where, weighted=True)
    if record.get("completion") is not None:
        raise DataError(f"{where}: both `messages` and `completion` are given.", "Keep one of them.")
    if messages[-1]["role"] != ASSISTANT:
        raise DataError(f"{where}: the last of `messages` is no answer.", "End it with the assistant's.")
    left_out = untrained(record["messages"], where)
    if left_out == answers_in(messages):
        raise DataError(
            f"{where}: every answer has `weight` 0, so nothing is trained on.", "Remove the line."
        )
    return Chat(messages, left_out)


def answers_in(messages: Sequence[Message]) -> frozenset[int]:
    """Which messages, counted from 0, are the assistant's."""
    return frozenset(i for i, message in enumerate(messages) if message["role"] == ASSISTANT)


def write_lines(path: Path, records: Iterable[Any]) -> int:
    """Write JSON lines. Returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line that is not blank; `where` names file and line.

    Raises DataError where the file can't be read or holds no object, where a line is not a JSON object, and where it
    has a key that would change what is read and isn't used (`workloads.data.messages.OF_A_LINE`).
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.", "Check the path.") from error
    empty = True
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where, empty = f"{path}, line {number}", False
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one
                raise DataError(f"{where} is not JSON: {error}.", "Correct or remove the line.") from error
            if not isinstance(record, dict):
                raise DataError(f"{where} is no JSON object.", 'Write {"prompt": ...} on each line.')
            refuse_line_keys(where, record)
            yield where, record
    if empty:
        raise DataError(f"{path} is empty.", "Give a file with an example on each line.")


def prompt_of(where: str, record: dict[str, Any]) -> Prompt:
    """The prompt of a line: a text, or messages that do not end with the assistant. Raises DataError."""
    if not isinstance(record.get("prompt"), list):
        return text_of(where, record, "prompt", or_messages=True)
    messages = plain_messages(record["prompt"], where, "prompt")
    if messages[-1]["role"] == ASSISTANT:
        raise DataError(
            f"{where}: the last message of `prompt` is the assistant's, so nothing is left to answer.",
            "Move it out of the prompt, into the answer.",
        )
    return messages


def text_of(where: str, record: dict[str, Any], key: str, or_messages: bool = False) -> str:
    """The text under `key`, which may be empty. Raises DataError."""
    kinds = "a text or a list of messages" if or_messages else "a text"
    if key not in record:
        raise DataError(f"{where}: `{key}` must be {kinds}, but is missing.", "Correct or remove the line.")
    return text_at(where, key, record[key], kinds)


def is_held_out(prompt: Prompt, fraction: float) -> bool:
    """Whether a prompt falls on the held-out side, by the hash of its content: the same in every file and order."""
    canonical = json.dumps(prompt, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return unit_interval(hashlib.sha256(canonical.encode()).digest()[:8]) < fraction


def split(examples: Iterable[P], fraction: float) -> tuple[list[P], list[P]]:
    """(train, held out). All answers to one prompt fall on one side, so that none of them is trained on.

    Raises DataError where a side stays empty, as with a single prompt.
    """
    train: list[P] = []
    held_out: list[P] = []
    for example in examples:
        (held_out if is_held_out(example.prompt, fraction) else train).append(example)
    if not train or not held_out:
        raise DataError(
            f"A held-out share of {fraction:g} by prompt leaves {len(train)} examples to train on and "
            f"{len(held_out)} held out.",
            "Give a held-out file, or more prompts.",
        )
    return train, held_out
