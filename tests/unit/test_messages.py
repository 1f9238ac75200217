"""Keys of messages: used or refused by name, the same in files, over HTTP and in calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from escala.contract.errors import DataError
from workloads.data.dialogues import read_dialogues
from workloads.data.preferences import read_preferences
from workloads.rewards.judge import read_references
from workloads.serving.parsing import parse
from workloads.serving.schemas import ChatRequest, CompareRequest, ScoreRequest

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
PART = {"type": "text", "text": "hi"}


def in_file(read: Callable[[Path], Any], key: str, **more: Any) -> Callable[[Path, list[Any]], None]:
    """Reads a file whose second line has the messages."""

    def take(path: Path, messages: list[Any]) -> None:
        line = {key: messages, **more}
        path.write_text("\n".join(json.dumps(each) for each in ({**line, key: [USER]} | more, line)))
        list(read(path))

    return take


def over_http(kind: type[Any], body: Callable[[list[Any]], Any]) -> Callable[[Path, list[Any]], None]:
    """Parses a request."""
    return lambda path, messages: parse(kind, json.dumps(body(messages)).encode())


PLACES = {
    "prompt": in_file(read_dialogues, "prompt", completion="c"),
    "preferences": in_file(read_preferences, "prompt", chosen="a", rejected="b"),
    "references": in_file(read_references, "prompt", response="a"),
    "chat": over_http(ChatRequest, lambda messages: {"messages": messages}),
    "score": over_http(ScoreRequest, lambda messages: {"prompts": [messages], "responses": ["a"]}),
    "compare": over_http(
        CompareRequest, lambda messages: {"prompts": [messages], "first": ["a"], "second": ["b"]}
    ),
}
REFUSED = [
    *(
        (ANSWER | {key: value}, key)
        for key, value in {
            "weight": 0,
            "name": "Bob",
            "tools": [{"type": "function"}],
            "tool_calls": [{"id": "1"}],
            "tool_call_id": "1",
            "function_call": {"name": "f"},
            "reasoning_content": "because",
            "reasoning": "because",
            "thinking": "because",
            "audio": {"id": "1"},
            "images": ["x.png"],
            "refusal": "No.",
            "prefix": True,
            "cache_control": {"type": "ephemeral"},
            "anything": 1,
        }.items()
    ),
    ({"role": "user", "content": [PART, {"type": "image_url", "image_url": {"url": "x"}}]}, "image_url"),
    ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "input_audio"),
    ({"role": "user", "content": [PART | {"cache_control": {"type": "ephemeral"}}]}, "cache_control"),
    ({"role": "user", "content": [PART, PART]}, "2 parts"),
    ({"role": "user", "content": []}, "0 parts"),
    ({"role": "user", "content": None}, "content"),
    ({"role": "user"}, "content"),
    ({"role": "function", "content": "x"}, "function"),
    ({"role": "developer", "content": "x"}, "developer"),
    ({"content": "x"}, "role"),
    ({"role": "nobody" * 10_000, "content": "x"}, "nobody"),
    ({"role": "user", "content": "x", "other" * 10_000: 1}, "other"),
]


@pytest.mark.parametrize(("message", "word"), REFUSED, ids=[word for _, word in REFUSED])
@pytest.mark.parametrize("place", PLACES)
def test_what_would_change_the_meaning_is_refused_by_name(
    place: str, message: dict[str, Any], word: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        PLACES[place](tmp_path / "some.jsonl", [USER, message, USER])
    assert word in caught.value.message
    assert len(caught.value.message) < 300 + len(str(tmp_path))
    assert "message 2" in caught.value.message
    if place in ("prompt", "preferences", "references"):
        assert f"{tmp_path / 'some.jsonl'}, line 2" in caught.value.message


@pytest.mark.parametrize(
    "message",
    [
        ANSWER,
        {"role": "assistant", "content": [PART]},
        ANSWER
        | {"refusal": None, "annotations": [], "audio": None, "tool_calls": None, "function_call": None},
        ANSWER | {"id": "7", "timestamp": 1.5, "prefix": False},
        {"role": "tool", "content": "21"},
        {"role": "system", "content": ""},
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_what_says_nothing_is_taken(place: str, message: dict[str, Any], tmp_path: Path) -> None:
    PLACES[place](tmp_path / "some.jsonl", [message, USER])


def test_a_request_has_roles_and_texts_alone() -> None:
    body = {"messages": [{"role": "user", "content": [PART], "id": "7"}]}
    assert parse(ChatRequest, json.dumps(body).encode()).messages == [USER]
