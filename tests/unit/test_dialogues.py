"""Prompts, answers and preferences in JSON lines: what is read, one clear error for each bad line, the split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from escala.contract.errors import DataError
from workloads.data.dialogues import Chat, TextCompletion, read_dialogues, read_lines, split
from workloads.data.messages import OF_A_LINE, WITHOUT_MEANING
from workloads.data.preferences import Preference, read_preferences, write_preferences

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_dialogues_of_all_three_kinds(tmp_path: Path) -> None:
    path = write(
        tmp_path / "sft.jsonl",
        {"prompt": "Once", "completion": " upon", "source": "ignored"},
        "",
        {"prompt": [USER], "completion": "4"},
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER, USER, ANSWER]},
    )
    text, short, long = read_dialogues(path)
    assert text == TextCompletion("Once", " upon")
    assert short == Chat([USER, ANSWER])
    assert short.prompt == [USER]
    assert isinstance(long, Chat)
    assert long.prompt == [{"role": "system", "content": ""}, USER]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 is no JSON object"),
        ({"prompt": "p"}, "line 2: `completion` must be a text, but is missing"),
        (
            {"prompt": 3, "completion": "c"},
            "line 2: `prompt` must be a text or a list of messages, but is int",
        ),
        ({"prompt": [], "completion": "c"}, "line 2: `prompt` must be a list of messages"),
        ({"prompt": [USER, ANSWER], "completion": "c"}, "the last message of `prompt` is the assistant's"),
        ({"prompt": "p", "completion": "\ud800"}, "line 2: `completion` is not valid Unicode"),
        ({"messages": [USER]}, "line 2: the last of `messages` is no answer"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "line 2: every answer has `weight` 0"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "line 2, message 2 of `messages`: `weight` is 0.5"),
        ({"messages": [USER, ANSWER | {"weight": True}]}, "message 2 of `messages`: `weight` is True"),
        ({"messages": [USER | {"weight": 1}, ANSWER]}, "message 1 of `messages`: `weight` 1 on a message"),
        (
            {"prompt": [USER, ANSWER | {"weight": 0}, USER], "completion": "c"},
            "message 2 of `prompt`: the key `weight`",
        ),
        ({"messages": [USER, ANSWER], "completion": "c"}, "line 2: both `messages` and `completion`"),
        ({"prompt": "p", "completion": "c", "label": False}, "line 2: `label` is false"),
        ({"messages": [USER, {"role": "bot", "content": "4"}]}, "message 2 of `messages` has the role 'bot'"),
        ({"messages": [{"role": "user"}, ANSWER]}, "message 1 of `messages`: `content` must be a text"),
    ],
)
def test_a_bad_dialogue_is_named_with_its_line(tmp_path: Path, line: Any, words: str) -> None:
    path = write(tmp_path / "sft.jsonl", {"prompt": "p", "completion": "c"}, line)
    with pytest.raises(DataError) as caught:
        list(read_dialogues(path))
    assert words in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize("key", OF_A_LINE)
def test_a_key_that_would_change_what_a_line_means_is_refused(tmp_path: Path, key: str) -> None:
    line = {"prompt": "p", "completion": "c"}
    with pytest.raises(DataError, match=rf"line 2: the key `{key}` is not used here"):
        list(read_lines(write(tmp_path / "sft.jsonl", line, line | {key: [{"x": 1}]})))
    assert len(list(read_lines(write(tmp_path / "sft.jsonl", line | {key: None}, line | {key: []})))) == 2


def test_an_answer_of_weight_0_is_read_and_not_trained_on(tmp_path: Path) -> None:
    path = write(
        tmp_path / "sft.jsonl",
        {"messages": [USER, ANSWER | {"weight": 0}, USER | {"weight": 0}, ANSWER | {"weight": 1.0}]},
        {"prompt": [USER, ANSWER, USER], "completion": "4"},
        {"messages": [USER | dict.fromkeys(WITHOUT_MEANING, "x"), ANSWER | {"tool_calls": None, "name": ""}]},
    )
    weighted, history, plain = read_dialogues(path)
    assert weighted == Chat([USER, ANSWER, USER, ANSWER], frozenset({1}))
    assert history == Chat([USER, ANSWER, USER, ANSWER], frozenset({1}))  # as preferences have it
    assert plain == Chat([USER, ANSWER])


def test_files_that_are_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        list(read_dialogues(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="is empty"):
        list(read_preferences(write(tmp_path / "blank.jsonl", "", " ")))


def test_preferences_survive_writing_and_reading(tmp_path: Path) -> None:
    preferences = [Preference("é\n", "a", ""), Preference([USER], "4", "5", margin=1.5)]
    path = tmp_path / "pairs.jsonl"
    assert write_preferences(path, preferences, win_probability=[0.7, 0.9]) == 2
    assert list(read_preferences(path)) == preferences
    assert json.loads(path.read_text().splitlines()[1])["win_probability"] == 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": None}, "line 1: `chosen` must be a text, but is NoneType"),
        ({"rejected": "c"}, "line 1: chosen and rejected are the same text"),
        ({"margin": -1}, "line 1: the margin -1 is no number >= 0"),
        ({"margin": float("nan")}, "the margin nan"),
        ({"margin": True}, "the margin True"),
        ({"margin": "2"}, "the margin '2'"),
    ],
)
def test_a_bad_preference_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        list(read_preferences(write(tmp_path / "pairs.jsonl", PAIR | change)))
    assert words in caught.value.message


def test_the_split_is_by_prompt_and_the_same_in_any_order() -> None:
    pairs = [Preference(f"prompt {i % 300}", f"{i}", "other") for i in range(900)]
    train, held_out = split(pairs, 0.2)
    assert len(train) + len(held_out) == 900
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert 120 < len(held_out) < 240
    again = split(reversed(pairs), 0.2)
    assert again == (train[::-1], held_out[::-1])
    assert {p.prompt for p in held_out} < {p.prompt for p in split(pairs, 0.4)[1]}


def test_a_split_without_a_side_is_refused() -> None:
    with pytest.raises(DataError, match=r"leaves 0 examples|0 held out"):
        split([TextCompletion("the only prompt", str(i)) for i in range(50)], 0.1)
