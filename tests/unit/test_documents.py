"""The YAML that people write: what each value is, and that no file hangs, overflows or loses a line."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from escala import documents
from escala.contract.errors import EscalaError, NotFoundError, SpecError


def parse(text: str) -> Any:
    return documents.parse(text, "f.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True), ("False", False), ("yes", "yes"), ("on", "on"), ("No", "No"),
        ("~", None), ("null", None), ("none", "none"), ("1:30", "1:30"), ("2026-11-28", "2026-11-28"),
        ("2_000_000", 2_000_000), ("4e5", 4e5), ("1e-3", 1e-3), ("1.", 1.0), (".5", 0.5), ("+.5e-3", 5e-4),
        ("0o17", 15), ("0x1F", 31), ("0b1", "0b1"), ("1__0", "1__0"), ("1_", "1_"), ("0", 0), ("0.0", 0.0),
        ("'010'", "010"), ('"yes"', "yes"), ("a#b", "a#b"), ("v1.0.1", "v1.0.1"), ("-3", -3), ("1e30", 1e30),
        ("５", "５"), ("١.٥", "١.٥"), ("[1, yes]", [1, "yes"]), ("{a: 1}", {"a": 1}), ("|\n  # text\n", "# text\n"),
    ],
)  # fmt: skip
def test_values_are_yaml_1_2(text: str, value: Any) -> None:
    found = parse(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value) or isinstance(value, dict)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "the key a is there twice, in lines 1 and 3"),
        ("s:\n  b: 1\n  c: 2\n  b: 2", "the key b is there twice, in lines 2 and 4"),
        ("s: {b: 1, b: 2}", "the key b is there twice, in lines 1 and 1"),
        ("- {c: 1}\n- {d: 1,\n   d: 1}", "the key d is there twice, in lines 2 and 3"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a", "the key << is there twice, in lines 3 and 4"),
        ("1: a\n'1': b", "the key 1 is there twice, in lines 1 and 2"),
        ("a: &a {x: 1}\nb: {x: 2, <<: *a, x: 3}", "the key x is there twice"),
        ("a: 010", "line 1: 010 has a leading zero"),
        ("a: -00.5", "leading zero"),
        ("a: " + "9" * 5000, "a number of 5,000 characters"),
        ("a: 0x" + "f" * 5000, "a number of 5,002 characters"),
        ("a: 1\n---\nb: 2", "line 2: a second document begins"),
        ("a: !!python/object:os.system x", "a tag"),
        ("a: !!binary xx", "a tag"),
        ("!!set {a}", "a tag"),
        ("a: ! 5", "a tag"),
        ("%YAML 1.1\n---\na: yes", "%YAML asks for another version"),
        ("%YAML 1.3\n---\na: yes", "not YAML"),
        ("x: 1\n1.5: 2", "line 2: a key that is no text"),
        ("~: 1", "a key that is no text"),
        ("true: 1", "a key that is no text"),
        ("[a]: b", "a key that is no text"),
        ("a:\n\tb: 1", "line 2: not YAML"),
        ("a: &a [*a]", "*a is not defined above"),
        ("<<: 1", "<< merges mappings"),
        ('a: "\\U00110000"', "not YAML"),
        ('a: "\\ud800"', "surrogate"),
        ("a: \x07", "not YAML"),
        ("model: [1, \n", "line 2: not YAML"),
    ],
)  # fmt: skip
def test_what_is_refused_says_where(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert caught.value.message.startswith("f.yaml")
    assert says in caught.value.message
    assert caught.value.hint


def _doubling(inner: str) -> str:
    lines = [f"b{i}: &b{i} {inner.format(10 * f'*b{i - 1}, ')}" for i in range(1, 15)]
    return "\n".join(["b0: &b0 {x: 1, y: 2}", *lines])


@pytest.mark.parametrize(
    "text",
    [
        _doubling("[{}]"),
        _doubling("{{<<: [{}], z: 1}}"),
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "".join(" " * i + "a:\n" for i in range(1000)),
        "a: [" + "1," * 20_500 + "]",
        "x" * 1_000_001,
    ],
    ids=["laughs", "merges", "brackets", "braces", "dashes", "blocks", "values", "bytes"],
)
def test_a_bomb_is_refused_before_it_grows(text: str) -> None:
    started = time.process_time()
    with pytest.raises(SpecError):
        parse(text)
    assert time.process_time() - started < 5


def test_an_alias_and_a_merge_are_copies_and_the_explicit_key_wins() -> None:
    found = parse("a: &a {x: [1], y: 2}\nb: {<<: *a, y: 3}\nc: *a\n")
    assert found["b"] == {"x": [1], "y": 3}
    found["c"]["x"].append(2)
    assert found["a"]["x"] == [1] == found["b"]["x"]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * (documents.MOST_BYTES + 1))
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(SpecError, match="no regular file"):
            documents.read_yaml(path)
    with pytest.raises(SpecError, match=r"latin\.yaml, line 2: not UTF-8"):
        documents.read_yaml(tmp_path / "latin.yaml")
    with pytest.raises(SpecError, match="larger than"):
        documents.read_yaml(tmp_path / "large.yaml")
    with pytest.raises(NotFoundError):
        documents.read_yaml(tmp_path / "none.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert documents.read_yaml(tmp_path / "bom.yaml") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#5", "#5"), ("/tmp/run #3", "/tmp/run #3"), ("a=b=c", "a=b=c"), ("- x", ["x"]), ("{a: 1}", {"a": 1}),
        ("[a, 'x #y']", ["a", "x #y"]), ("'quoted # x'", "quoted # x"), ("5 # five", "5 # five"), ("x: y", "x: y"),
        ("null", None), ("1e-3", 1e-3), ("*x", "*x"), ("!!x y", "!!x y"), ("---", "---"), ("  7 ", 7),
        ("http://h/#part", "http://h/#part"), ("| x", "| x"), ("@x", "@x"), ("'010'", "010"),
    ],
)  # fmt: skip
def test_an_option_s_value_is_taken_whole(text: str, value: Any) -> None:
    assert documents.parse_value(text, "--set k") == value


@pytest.mark.parametrize(
    "text",
    ["", "  ", "010", "[a] # c", "'q' # x", "[a]#x", "[1, # a\n2]", "{root: /run #3}", "- /run #3", '"a" b', "[1"],
)  # fmt: skip
def test_an_option_s_value_loses_nothing_silently(text: str) -> None:
    with pytest.raises(SpecError, match="--set k"):
        documents.parse_value(text, "--set k")


def test_what_is_dumped_reads_back() -> None:
    words = (
        "yes",
        "1e5",
        "1_000",
        "010",
        "null",
        "True",
        "0o17",
        "# x",
        "a #b",
        "1:30",
        "<<",
        "+.5",
        ".inf",
        "- a",
        "a: b",
    )
    data = {
        "b": 1,
        "a": {"words": [*words], "none": None, "small": 1e-05, "large": 1e30, "empty": "", "lines": "a\nb\n"},
    }
    text = documents.dump(data)
    assert parse(text) == data
    assert text.startswith("b: 1\n")  # in the order given


def test_random_bytes_end_in_a_value_or_an_error() -> None:
    import random

    rng = random.Random(0)
    alphabet = "ab:-{}[]&*!|>'\"%@`#,?\n \t0159._eE~<\\"
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 40)))
        try:
            parse(text)
        except EscalaError as error:
            assert error.message  # noqa: PT017
