"""The messages of a chat, checked in one place: files, HTTP requests and Python calls take the same ones.

A message is a role and a text. Every other key is used, refused by name, or listed here as one that changes nothing:
a key that is dropped silently makes another conversation of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from escala.contract.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
ASSISTANT = "assistant"

Message = dict[str, str]

WITHOUT_MEANING = frozenset(
    {
        "id",
        "message_id",
        "turn_identifier",
        "created",
        "created_at",
        "timestamp",
        "model",
        "source",
        "lang",
        "language",
        "country",
        "hashed_ip",
        "header",
        "state",
        "redacted",
        "toxic",
    }
)
"""Keys of a message that say where it is from, not what it says: they are left out."""

OF_A_LINE = {
    "tools": "tools are not rendered here",
    "functions": "tools are not rendered here",
    "tool_choice": "tools are not rendered here",
    "parallel_tool_calls": "tools are not rendered here",
    "tool_calls": "tools are not rendered here",
    "function_call": "tools are not rendered here",
    "documents": "documents are not rendered here",
    "system": "a system prompt belongs into the messages",
    "system_prompt": "a system prompt belongs into the messages",
    "reasoning": "reasoning belongs into the text, as the chat template writes it",
    "reasoning_content": "reasoning belongs into the text, as the chat template writes it",
    "thinking": "reasoning belongs into the text, as the chat template writes it",
    "chat_template": "the tokenizer's own template is used",
    "chat_template_kwargs": "the template gets no arguments",
    "weight": "only an assistant message of `messages` has a weight",
    "weights": "only an assistant message of `messages` has a weight",
    "images": "only text is read",
    "image": "only text is read",
    "audio": "only text is read",
    "audios": "only text is read",
    "video": "only text is read",
    "videos": "only text is read",
}
"""Keys beside the prompt or the messages of a line that would change what the model reads, and why each is refused."""


def is_neutral(value: object) -> bool:
    """Whether a value says nothing: null, false, or an empty list, object or text."""
    return value is None or value is False or (isinstance(value, list | dict | str) and not value)


def refuse_line_keys(where: str, record: Mapping[str, Any]) -> None:
    """Raise DataError for the first key of OF_A_LINE that says something; a weight of 1 is what every line has."""
    for key, reason in OF_A_LINE.items():
        value = record.get(key)
        if is_neutral(value) or (key == "weight" and not isinstance(value, bool) and value == 1):
            continue
        raise DataError(f"{where}: the key `{key}` is not used here: {reason}.", _LINE_FIX)


def plain_messages(
    value: object, where: str = "", key: str = "messages", weighted: bool = False
) -> list[Message]:
    """The messages with `role` and `content` alone.

    Args:
        where: file and line, for errors.
        key: what holds the messages, for errors.
        weighted: whether `weight` may stand on them; `untrained` reads it.

    Raises DataError that names the place (messages count from 1) and the key, where a message is not a known role with
    a text, or has a key that would change what it means.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        lacking = "" if value or not isinstance(value, list | tuple) else ", but there is no message"
        raise DataError(
            f"{where}{': ' if where else ''}`{key}` must be a list of messages{lacking}.",
            'Write [{"role": ..., "content": ...}].',
        )
    before = f"{where}, " if where else ""
    return [
        _plain(message, f"{before}message {number} of `{key}`", weighted)
        for number, message in enumerate(value, start=1)
    ]


def untrained(messages: Sequence[Mapping[str, Any]], where: str) -> frozenset[int]:
    """The assistant messages, counted from 0, whose `weight` is 0: they are read and not trained on. Raises DataError
    for a weight that is neither 0 nor 1, and for one of another role, which is never trained on.
    """
    found = set()
    for number, message in enumerate(messages):
        weight = message.get("weight")
        if weight is None:
            continue
        inside = f"{where}, message {number + 1} of `messages`"
        if isinstance(weight, bool) or weight not in (0, 1):
            raise DataError(f"{inside}: `weight` is {repr(weight)[:100]}.", "Give 0 (not trained on) or 1.")
        if message["role"] == ASSISTANT and weight == 0:
            found.add(number)
        elif message["role"] != ASSISTANT and weight == 1:
            raise DataError(
                f"{inside}: `weight` 1 on a message of the role {message['role']!r}, and only the assistant's are "
                "trained on.",
                "Remove the key.",
            )
    return frozenset(found)


def text_at(inside: str, key: str, value: object, kinds: str = "a text") -> str:
    """`value` as a text that can be encoded. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{inside}: `{key}` must be {kinds}, but is {type(value).__name__}.", _FIX)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{inside}: `{key}` is not valid Unicode.", "Remove the lone surrogate.") from error
    return value


_FIX = "Give a text; with none, an empty one or no message."
_LINE_FIX = "Write what it says into the messages, or remove the key or the line."


def _plain(message: object, inside: str, weighted: bool) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{inside} is no object of role and content.", 'Write {"role": ..., "content": ...}.')
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{inside} has the role {repr(role)[:100]}.", f"Give one of {', '.join(ROLES)}.")
    used = {"role", "content", *(["weight"] if weighted else [])}
    for key in sorted(map(str, message.keys() - used - WITHOUT_MEANING)):
        if not is_neutral(message[key]):
            raise DataError(
                f"{inside}: the key `{key[:100]}` is not used here, and without it the message would mean something "
                "else.",
                "Write what it says into `content`, or remove the key or the conversation.",
            )
    if "content" not in message:
        raise DataError(f"{inside}: `content` must be a text, but is missing.", _FIX)
    return {"role": str(role), "content": _content(inside, message["content"])}


def _content(inside: str, content: object) -> str:
    """A text, or OpenAI's list of parts with one part of text."""
    if not isinstance(content, list):
        return text_at(inside, "content", content)
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            told = f"a part of the type {repr(kind)[:100]}" if kind is not None else "no text as content"
            raise DataError(
                f"{inside}: `content` has {told}; only text is read.", "Write `content` as a text."
            )
        others = [key for key in part.keys() - {"type", "text"} if not is_neutral(part[key])]
        if others:
            raise DataError(
                f"{inside}: the key `{str(others[0])[:100]}` of a part of `content` is not used.",
                "Remove it.",
            )
    if len(content) != 1:
        raise DataError(
            f"{inside}: `content` has {len(content)} parts, and how they are joined is not said.",
            "Write them as one text.",
        )
    return text_at(inside, "content", content[0].get("text"))
