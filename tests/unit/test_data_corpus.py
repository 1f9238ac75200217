"""Corpora: order, duplicates, split, one clear error for each bad input. Tokenizer: its fast path."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from escala.contract.errors import DataError
from escala.schema import (
    Corpus,
    DataConfig,
    FilesCorpus,
    HuggingFaceCorpus,
    JsonlCorpus,
    PythonSourceCorpus,
)
from workloads.data import corpus as corpora
from workloads.data.corpus import Document, read_documents
from workloads.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer, wrap


def read(corpus: Corpus, **settings: object) -> list[Document]:
    return list(read_documents(corpus, DataConfig(corpora=[corpus], **settings)))


def write(root: Path, files: dict[str, str]) -> FilesCorpus:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return FilesCorpus(kind="files", root=str(root))


def test_duplicates_and_empty_texts_are_left_out_and_the_order_is_fixed(tmp_path: Path) -> None:
    files = {f"f{i}.txt": f"text {i % 5}" for i in range(20)} | {"empty.txt": " \n"}
    documents = read(write(tmp_path / "a", files))
    assert sorted(d.text for d in documents) == [f"text {i}" for i in range(5)]
    again = read(write(tmp_path / "b", dict(reversed(files.items()))))
    assert documents == again


def test_the_split_is_by_content_alone(tmp_path: Path) -> None:
    first = read(
        write(tmp_path / "a", {f"{i}.txt": f"number {i}" for i in range(400)}), held_out_fraction=0.25
    )
    second = read(
        write(tmp_path / "b", {f"x{i}.txt": f"number {i}" for i in range(100)}), held_out_fraction=0.25
    )
    sides = {d.text: d.held_out for d in first}
    assert all(sides[d.text] == d.held_out for d in second)
    assert 60 < sum(sides.values()) < 140
    more = {d.text for d in read(write(tmp_path / "a", {}), held_out_fraction=0.4) if d.held_out}
    assert {text for text, held_out in sides.items() if held_out} < more


def test_max_characters_stops_reading(tmp_path: Path) -> None:
    root = write(tmp_path, {f"{i}.txt": f"{i:010d}" for i in range(50)})
    assert [len(read(root, max_characters=n)) for n in (1, 10, 11, 10_000)] == [1, 1, 2, 50]


def test_globs_stay_inside_the_root(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"in.txt": "inside"})
    assert [d.text for d in read(root)] == ["inside"]
    with pytest.raises(DataError, match="leaves the root"):
        read(root.model_copy(update={"globs": ["../*.txt"]}))
    (tmp_path / "secret.txt").write_text("outside")
    os.symlink(tmp_path / "secret.txt", tmp_path / "root" / "link.txt")
    with pytest.raises(DataError, match="outside of the root"):
        read(root)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.txt": "fine"})
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8"):
        read(root)
    with pytest.raises(DataError, match="No file under"):
        read(root.model_copy(update={"globs": ["*.md"]}))
    with pytest.raises(DataError, match="not a directory"):
        read(FilesCorpus(kind="files", root=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not JSON"),
        ("[" * 100_000, "line 3 is not JSON"),
        ('{"body": "x"}', "line 3 has no text under the key 'text'"),
        ('["text"]', "line 3 has no text"),
        ('{"text": "\\ud800"}', "line 3 is not valid Unicode"),
    ],
)
def test_a_bad_jsonl_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"text": "ä"}) + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read(JsonlCorpus(kind="jsonl", path=str(path)))
    with pytest.raises(DataError, match="can't be read"):
        read(JsonlCorpus(kind="jsonl", path=str(tmp_path / "none.jsonl")))


def test_hugging_face_without_datasets_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install datasets"):
        read(HuggingFaceCorpus(kind="huggingface", name="a/b"))


def test_python_source_versions_are_those_of_the_constraints_and_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    for name, version in corpora.PYTHON_SOURCE_VERSIONS.items():
        assert f"{name}=={version}" in constraints
    monkeypatch.setitem(corpora.PYTHON_SOURCE_VERSIONS, "networkx", "0.0.1")
    with pytest.raises(DataError, match=r"networkx 0\.0\.1, but .* is installed") as caught:
        read(PythonSourceCorpus(packages=["networkx"]))
    assert 'pip install "networkx==0.0.1"' in caught.value.hint
    with pytest.raises(DataError, match="has no package flask"):
        read(PythonSourceCorpus(packages=["flask"]))


def test_python_source_reads_the_standard_library_without_its_tests() -> None:
    corpus = PythonSourceCorpus(packages=["python"])
    names = [name for name, _ in itertools.islice(corpora._source(corpus), 500)]
    assert len(names) == 500
    assert names != sorted(names)
    assert not any("/test/" in name or "/tests/" in name or "site-packages" in name for name in names)


def test_word_by_word_encoding_is_exactly_the_librarys() -> None:
    texts = [
        "".join(parts)
        for parts in itertools.product(map(chr, range(128)), ["a", " ", "\n", "'s", "1", "  ."])
    ]
    everything = " ".join(texts) + "".join(map(chr, range(128))) + "def f(x):\n\t\treturn x  # it's\r\n\r\n "
    tokenizer = wrap(train_tokenizer([everything], 400), "test")
    texts += [everything, "größe ä", "", f"{END_OF_TEXT} spelt out"]
    expected = [e.ids for e in tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert tokenizer._words is not None
    for text, ours, theirs in zip(texts, tokenizer.encode(texts), expected, strict=True):
        assert ours.tolist() == theirs
        assert tokenizer.end_of_text not in theirs
        assert tokenizer.decode(theirs) == text


def test_a_tokenizer_is_known_by_its_content(tmp_path: Path) -> None:
    trained = wrap(train_tokenizer(["some text, some more text"], 270), "test")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(trained.tokenizer.to_str()), sort_keys=True, indent=3))
    assert load_tokenizer(path).fingerprint == trained.fingerprint
    assert trained.vocab_size <= 270
    path.write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(path)
    path.write_text(Tokenizer(models.BPE({"a": 0}, [])).to_str())
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(path)
