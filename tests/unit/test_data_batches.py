"""Preparation and batches: nothing twice, the same batch at any number of ranks, windows once an epoch."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from escala.contract.errors import DataError
from escala.schema import DataConfig, PretrainConfig
from workloads.data import shards
from workloads.data.batches import Batches
from workloads.data.cache import BLOCK_BYTES, TokenDirectory, TokenFile, TokenWriter, new_directory
from workloads.data.mixture import BLOCK_SEQUENCES, block_shares, draw, epoch_order
from workloads.data.shards import PreparedData, check, prepare
from workloads.data.tokenizer import TextTokenizer, load_tokenizer

CONTEXT = 16


def config_of(root: Path, *weights: float, **changes: object) -> DataConfig:
    """One `files` corpus a weight; the first has 60 documents, the next 120, and so on."""
    corpora = []
    for number, weight in enumerate(weights):
        folder = root / f"corpus{number}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(60 * (number + 1)):
            (folder / f"{i}.txt").write_text(
                f"corpus {number} document {i} says " + "word " * (i % 7) + "fin"
            )
        corpora.append({"kind": "files", "root": str(folder), "weight": weight})
    values = {"corpora": corpora, "tokenizer": {"vocab_size": 300}, "held_out_fraction": 0.2}
    return DataConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    root = tmp_path_factory.mktemp("data")
    return prepare(config_of(root, 3.0, 1.0), root / "store", CONTEXT)


def pretrain(data: DataConfig, **training: object) -> PretrainConfig:
    values = {"steps": 3, "batch_sequences": 4, "context_tokens": CONTEXT} | training
    return PretrainConfig.model_validate({"data": data.model_dump(), "training": values})


def test_the_store_holds_every_document_followed_by_end_of_text(prepared: PreparedData) -> None:
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    for number, corpus in enumerate(prepared.corpora):
        texts = []
        for name in ("train", "held_out"):
            split = getattr(corpus.manifest, name)
            tokens = np.asarray(corpus.tokens(name))
            assert tokens.dtype == np.uint16
            assert (tokens == prepared.end_of_text).sum() == split.documents
            pieces = np.split(tokens, np.flatnonzero(tokens == prepared.end_of_text) + 1)
            found = [tokenizer.decode(piece.tolist()) for piece in pieces[:-1]]
            assert len(pieces[-1]) == 0
            assert sum(len(text.encode()) for text in found) == split.text_bytes
            texts += found
        assert len(set(texts)) == len(texts) == 60 * (number + 1)
        assert all(text.startswith(f"corpus {number} ") for text in texts)
    bytes_held_out = sum(corpus.manifest.held_out.text_bytes for corpus in prepared.corpora)
    assert prepared.held_out_bytes_per_token == bytes_held_out / prepared.held_out_tokens


def test_a_second_call_tokenises_nothing_and_a_worker_reopens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, 1.0)
    first = prepare(config, tmp_path / "store", CONTEXT)
    shutil.move(tmp_path / "store", tmp_path / "moved")  # paths inside are relative

    def refuse(*arguments: object) -> None:
        raise AssertionError("tokenised twice")

    monkeypatch.setattr(TextTokenizer, "encode", refuse)
    monkeypatch.setattr(shards, "train_tokenizer", refuse)
    second = prepare(config, tmp_path / "moved", CONTEXT)
    assert second.path.name == first.path.name
    reopened = PreparedData.open(str(second.path))
    assert reopened.train_tokens == first.train_tokens > 0
    assert reopened.corpus_fingerprint == first.corpus_fingerprint
    (tmp_path / "corpus0" / "0.txt").write_text("changed")
    with pytest.raises(AssertionError, match="twice"):
        prepare(config, tmp_path / "moved", CONTEXT)


def test_evaluation_is_known_by_held_out_text_and_tokenizer_only(
    tmp_path: Path, prepared: PreparedData
) -> None:
    given = {"tokenizer": {"path": str(prepared.tokenizer_path)}}
    first = prepare(config_of(tmp_path, 1.0, **given), tmp_path / "store", CONTEXT)
    assert prepare(config_of(tmp_path, 2.0, **given), tmp_path / "store", 4).evaluation_fingerprint == (
        first.evaluation_fingerprint
    )
    documents = sorted((tmp_path / "corpus0").glob("*.txt"))
    for document in documents:  # some of them are training documents: dropping one changes the corpus only
        text = document.read_text()
        document.unlink()
        without = prepare(config_of_existing(tmp_path, given), tmp_path / "store", CONTEXT)
        document.write_text(text)
        if without.held_out_tokens == first.held_out_tokens:
            assert without.corpus_fingerprint != first.corpus_fingerprint
            assert without.evaluation_fingerprint == first.evaluation_fingerprint
            return
        assert without.evaluation_fingerprint != first.evaluation_fingerprint
    raise AssertionError("no training document found")


def config_of_existing(root: Path, changes: dict) -> DataConfig:
    corpora = [{"kind": "files", "root": str(root / "corpus0")}]
    return DataConfig.model_validate({"corpora": corpora, "held_out_fraction": 0.2} | changes)


def test_two_at_once_make_one_good_store(tmp_path: Path) -> None:
    config = config_of(tmp_path, 1.0)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: prepare(config, tmp_path / "store", CONTEXT), range(3)))
    assert len({result.path for result in results}) == 1
    assert [path.name for path in (tmp_path / "store").rglob(".*")] == []
    PreparedData.open(results[0].path)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_store_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    result = prepare(config_of(tmp_path, 1.0), tmp_path / "store", CONTEXT)
    file = result.corpora[0].path / "train.bin"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "changed" else content[:-2])
    with pytest.raises(DataError, match=r"damaged: train\.bin"):
        PreparedData.open(result.path)


def big_store(root: Path, tokens: int) -> Path:
    """A store whose train.bin has several blocks."""
    directory = root / "tokens" / "x"
    with new_directory(directory) as new:
        writer = TokenWriter(new, 70_000, 0)
        writer.add(np.arange(tokens - 1, dtype=np.uint32), b"digest", 9, held_out=False)
        writer.close("corpus", "tokenizer")
    return directory


def test_a_flipped_bit_is_refused_when_its_block_is_first_read(tmp_path: Path) -> None:
    per_block = BLOCK_BYTES // 4
    directory = big_store(tmp_path, 5 * per_block + 10)
    file = directory / "train.bin"
    content = file.read_bytes()
    rng = random.Random(14)
    for block in (0, 1, 2, 3, 4, 5):
        changed = bytearray(content)
        at = rng.randrange(block * BLOCK_BYTES, min(len(content), (block + 1) * BLOCK_BYTES))
        changed[at] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        if block in (0, 5):  # the ends are compared when it is opened
            with pytest.raises(DataError, match=rf"damaged: train\.bin: the hash of block {block} "):
                TokenDirectory(directory)
            continue
        tokens = TokenDirectory(directory).tokens("train")
        assert len(tokens[: block * per_block]) == block * per_block  # all blocks before it are good
        for part in (
            slice(block * per_block - 1, block * per_block + 1),
            slice(at // 4, at // 4 + 1),
            slice(None),
        ):
            with pytest.raises(DataError, match=rf"train\.bin: the hash of block {block} ") as caught:
                tokens[part]
        assert "Delete that directory; the next run writes it again" in caught.value.hint
    file.write_bytes(content)
    tokens = TokenDirectory(directory).tokens("train")
    assert np.array_equal(np.asarray(tokens)[:-1], np.arange(len(tokens) - 1))


def test_a_block_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TokenDirectory(big_store(tmp_path, 4 * BLOCK_BYTES // 4)).tokens("train")
    hashed, original = [], TokenFile._check

    def counted(self: TokenFile, block: int) -> None:
        hashed.append(block)
        original(self, block)

    monkeypatch.setattr(TokenFile, "_check", counted)
    for start in range(0, len(tokens), 100):
        tokens[start : start + 100]
    assert hashed == [1, 2]  # and the two ends, before


@pytest.mark.parametrize("name", ["manifest.json", "contents.json", "train.sha256"])
def test_a_flipped_bit_beside_the_tokens_is_refused(tmp_path: Path, name: str) -> None:
    directory = big_store(tmp_path, BLOCK_BYTES)
    content = (directory / name).read_bytes()
    for bit in random.Random(14).sample(range(8 * len(content)), 50):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (directory / name).write_bytes(changed)
        with pytest.raises(DataError, match="is damaged"):
            TokenDirectory(directory)


@pytest.mark.parametrize("name", ["tokenizers/*/tokenizer.json", "prepared/*.json"])
def test_a_damaged_tokenizer_or_description_is_refused(tmp_path: Path, name: str) -> None:
    config = config_of(tmp_path, 1.0)
    result = prepare(config, tmp_path / "store", CONTEXT)
    (file,) = (tmp_path / "store").glob(name)
    text = file.read_text()
    file.write_text(text.replace("300", "301") if "300" in text else text[:-9])
    with pytest.raises(DataError, match=r"is damaged: tokenizer\.json|its content is not what its name says"):
        PreparedData.open(result.path)
    file.write_text("{}")
    with pytest.raises(DataError):
        PreparedData.open(result.path)
    if "tokenizers" in name:
        with pytest.raises(DataError, match=r"is damaged: tokenizer\.json"):
            prepare(config, tmp_path / "store", CONTEXT)
        shutil.rmtree(file.parent)
    else:
        file.unlink()
    assert prepare(config, tmp_path / "store", CONTEXT).path == result.path  # what the hint says is enough


def test_a_directory_of_an_earlier_version_is_written_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, 1.0)
    result = prepare(config, tmp_path / "store", CONTEXT)
    for directory in (result.corpora[0].path, result.tokenizer_path.parent):
        (directory / "contents.json").unlink()
    assert prepare(config, tmp_path / "store", CONTEXT).path == result.path
    PreparedData.open(result.path)


def test_bad_data_gives_one_clear_error(tmp_path: Path, prepared: PreparedData) -> None:
    data = config_of(tmp_path, 3.0, 1.0)
    check(prepared, pretrain(data))
    small = pretrain(data).model_copy(
        update={"model": pretrain(data).model.model_copy(update={"vocab_size": 280})}
    )
    with pytest.raises(DataError, match=r"tokenizer has 300 tokens, the model only 280"):
        check(prepared, small)
    with pytest.raises(DataError, match=r"one batch needs"):
        check(prepared, pretrain(data, batch_sequences=4000))
    once = data.model_copy(update={"allow_repeats": False})
    check(prepared, pretrain(once))
    with pytest.raises(DataError, match=r"allow_repeats is false"):
        check(prepared, pretrain(once, steps=1000))
    with pytest.raises(DataError, match="not one sequence"):
        prepare(data, tmp_path / "store", 10_000)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    empty = {"corpora": [{"kind": "files", "root": str(tmp_path / "empty")}]}
    with pytest.raises(DataError, match="no training document"):
        prepare(DataConfig.model_validate(empty), tmp_path / "store", CONTEXT)


def test_held_out_windows_are_the_same_text_at_every_context(prepared: PreparedData) -> None:
    short, long = prepared.held_out(8, 128), prepared.held_out(16, 128)
    assert short.dtype == torch.int64
    assert short[:, 1:].numel() == long[:, 1:].numel() == 128
    assert torch.equal(short[:, :-1].flatten(), long[:, :-1].flatten())
    everything = prepared.held_out(8, 10**9)
    assert everything[:, 1:].numel() > prepared.held_out_tokens - 2 * (8 + 1)


@given(
    cut=st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3), (3, 4), (4, 1), (6, 2), (12, 1)]),
    step=st.integers(0, 2000),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=25, deadline=None)
def test_the_global_batch_does_not_depend_on_ranks(
    prepared: PreparedData, cut: tuple[int, int], step: int, seed: int
) -> None:
    ranks, micros = cut
    whole = Batches(prepared, CONTEXT, 12, seed).batch(step)
    pieces = Batches(prepared, CONTEXT, 12, seed, micro_batch_sequences=12 // ranks // micros)
    parts = [pieces.batch(step, rank, ranks, micro) for micro in range(micros) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.shape == (12, CONTEXT + 1)


def test_a_part_that_does_not_cut_the_batch_is_refused(prepared: PreparedData) -> None:
    batches = Batches(prepared, CONTEXT, 8, 0)
    for rank, ranks, micro in ((0, 3, 0), (2, 2, 0), (0, 2, 1)):
        with pytest.raises(ValueError, match="no part of"):
            batches.batch(0, rank, ranks, micro)


def test_each_window_is_seen_once_an_epoch_in_another_order(prepared: PreparedData) -> None:
    batches = Batches(prepared, CONTEXT, 4, seed=3)
    seen: dict[tuple[int, int], list[int]] = {}
    for sequence in range(3 * BLOCK_SEQUENCES):
        corpus, epoch, window = batches.locate(sequence)
        seen.setdefault((corpus, epoch), []).append(window)
    for corpus, windows in enumerate(prepared.windows(CONTEXT)):
        assert sorted(seen[corpus, 0]) == sorted(seen[corpus, 1]) == list(range(windows))
        assert seen[corpus, 0] != seen[corpus, 1]
        counts = sum(len(found) for (which, _), found in seen.items() if which == corpus)
        assert batches.epochs(3 * BLOCK_SEQUENCES // 4)[corpus] == pytest.approx(counts / windows)
    assert torch.equal(batches.batch(5), Batches(prepared, CONTEXT, 4, seed=3).batch(5))
    assert not torch.equal(batches.batch(5), Batches(prepared, CONTEXT, 4, seed=4).batch(5))


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), seed=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_a_block_holds_exact_shares_and_counts_on(weights: list[float], seed: int) -> None:
    shares = block_shares(weights)
    assert sum(shares) == BLOCK_SEQUENCES
    assert min(shares) >= 1
    exact = np.asarray(weights) / sum(weights) * BLOCK_SEQUENCES
    assert np.abs(shares - exact).max() <= len(weights)
    drawn = [draw(shares, seed, BLOCK_SEQUENCES + i) for i in range(BLOCK_SEQUENCES)]
    assert Counter(corpus for corpus, _ in drawn) == dict(enumerate(shares))
    for corpus, share in enumerate(shares):
        numbers = [before for which, before in drawn if which == corpus]
        assert numbers == list(range(share, 2 * share))


def test_the_order_never_changes_between_versions() -> None:
    assert sorted(epoch_order(50, 7, 0, 0)) == list(range(50))
    assert epoch_order(8, 7, 0, 0).tolist() == PINNED_ORDER


PINNED_ORDER = [7, 4, 3, 0, 1, 5, 2, 6]
