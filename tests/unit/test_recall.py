"""The recall corpus: what is drawn, stored, refused, and what an evaluation says of a reader."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from escala.schema import DataConfig, PretrainConfig, RecallCorpus
from workloads.data.batches import Batches
from workloads.data.recall import (
    FIRST_BUCKET,
    HELD_OUT,
    KEY,
    TRAIN,
    UNSEEN,
    bucket,
    documents,
    group_targets,
    key_probabilities,
)
from workloads.data.recall import digest as digest_of
from workloads.data.shards import PreparedData, check, prepare
from workloads.pretrain import Pretraining, described

SMALL = {"kind": "recall", "keys": 12, "values": 5, "documents": 80, "held_out_documents": 20}


def corpus(**changes: Any) -> RecallCorpus:
    return RecallCorpus.model_validate({**SMALL, "document_tokens": 64, **changes})


def pretrain(
    context: int = 16, tokens: int = 17, training: dict[str, Any] | None = None, **changes: Any
) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "model": {
                "vocab_size": tokens,
                "n_layers": 1,
                "d_model": 8,
                "n_heads": 1,
                "max_context_tokens": 512,
            },
            "data": {"corpora": [corpus(**changes).model_dump()]},
            "training": {"context_tokens": context, "steps": 3, "batch_sequences": 4} | (training or {}),
        }
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare(pretrain().data, tmp_path_factory.mktemp("store"), 16)


def test_a_document_is_pairs_by_a_map_of_its_own() -> None:
    drawn = np.stack(list(documents(corpus(), TRAIN)))
    assert drawn.shape == (80, 64)
    keys, values = drawn[:, 0::2], drawn[:, 1::2]
    assert keys.max() < 12
    assert values.min() >= 12
    assert values.max() < 17
    for row in range(80):
        for key in range(12):
            assert len(set(values[row, keys[row] == key])) <= 1
    assert len({int(values[row, keys[row] == 0].max(initial=0)) for row in range(80)}) >= 5
    found = np.bincount(keys.flatten(), minlength=12) / keys.size
    p_K = key_probabilities(corpus())
    assert (np.abs(found - p_K) < 4 * np.sqrt(p_K / keys.size)).all()


def test_documents_are_a_pure_function_of_the_seed_and_of_the_split() -> None:
    held_out = list(documents(corpus(), HELD_OUT))
    more = list(documents(corpus(held_out_documents=70, documents=5), HELD_OUT))
    assert [digest_of(each) for each in held_out] == [digest_of(each) for each in more[:20]]
    others = {digest_of(each) for seed in (0, 1) for each in documents(corpus(seed=seed), TRAIN)}
    assert len(others | {digest_of(each) for each in held_out}) == 180
    # What is drawn must not change without DRAWN in recall_shards: stored fingerprints stand for it.
    assert held_out[0][:12].tolist() == [4, 15, 1, 13, 1, 13, 2, 12, 0, 12, 6, 13]


def test_the_store_holds_the_documents_without_separators(prepared: PreparedData) -> None:
    for name, split in (("train", TRAIN), ("held_out", HELD_OUT)):
        stored = np.asarray(prepared.corpora[0].tokens(name))
        assert stored.tolist() == np.concatenate(list(documents(corpus(), split))).tolist()
    assert prepared.end_of_text is prepared.tokenizer_path is None
    assert prepared.held_out_bytes_per_token == 0
    config = pretrain()
    check(prepared, config)
    told = described(prepared, config)
    assert told.tokenizer is None
    assert set(told.fingerprints) == {"corpus", "tokenizer", "evaluation"}


@pytest.mark.parametrize("context", [2, 16, 64])
def test_a_window_starts_on_a_key_and_stays_in_its_document(prepared: PreparedData, context: int) -> None:
    batches = Batches(prepared, context, 4, seed=3)
    tokens_NT1 = torch.cat([batches.batch(step) for step in range(10)] + [prepared.held_out(context, 640)])
    assert (tokens_NT1[:, 0::2] < 12).all()
    assert (tokens_NT1[:, 1::2] >= 12).all()
    everything = np.asarray(prepared.corpora[0].tokens("train"))
    windows = np.stack([everything[i * context :][:context] for i in range(len(everything) // context)])
    assert {tuple(row[:-1].tolist()) for row in tokens_NT1[:40]} <= {tuple(row) for row in windows.tolist()}


def test_the_evaluation_is_the_same_at_every_context(prepared: PreparedData, tmp_path: Path) -> None:
    texts = {context: prepared.held_out(context, 640)[:, :-1].flatten().tolist() for context in (2, 16, 64)}
    assert texts[2] == texts[16] == texts[64]

    def fingerprints(**changes: Any) -> tuple[str, str, str]:
        found = prepare(pretrain(**changes).data, tmp_path, 16)
        return found.corpus_fingerprint, found.tokenizer_fingerprint, found.evaluation_fingerprint

    first = fingerprints()
    assert fingerprints(context=32) == first
    for changes, same in (({"documents": 90}, [1, 2]), ({"held_out_documents": 21}, [1]), ({"seed": 1}, [1])):
        other = fingerprints(**changes)
        assert [i for i in range(3) if other[i] == first[i]] == same
    other = fingerprints(keys=11)
    assert not set(other) & set(first)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": 16}, "model.vocab_size 16 must be at least 17"),
        ({"context": 15}, "odd"),
        ({"context": 48}, "does not divide the recall corpus's document_tokens 64"),
        ({"context": 128}, "does not divide"),
        ({"document_tokens": 33}, "odd"),
        ({"context": 64, "held_out_documents": 1}, "one held-out window of 64 tokens"),
        ({"training": {"steps": 80}}, r"reads 320 windows of 16 tokens .* has 319.* at least 81"),
    ],
)
def test_what_would_not_have_the_stated_loss_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        pretrain(**changes)


def test_the_last_run_that_repeats_nothing_is_taken() -> None:
    assert pretrain(training={"steps": 79}).total_steps == 79


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corpora": [SMALL, {"kind": "python_source"}]}, "never mixed"),
        ({"tokenizer": {"vocab_size": 320}}, "data.tokenizer is of text"),
        ({"held_out_fraction": 0.1}, "data.held_out_fraction is of text"),
        ({"max_characters": 10}, "data.max_characters is of text"),
        ({"allow_repeats": False}, "data.allow_repeats is of text"),
    ],
)
def test_options_of_text_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DataConfig.model_validate({"corpora": [SMALL]} | changes)


def test_a_target_is_grouped_by_the_distance_of_its_key() -> None:
    assert [bucket(pairs) for pairs in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    tokens_NT1 = np.stack(list(documents(corpus(), TRAIN)))[:, :17].astype(np.int64)
    groups_NT = group_targets(corpus(), tokens_NT1)
    for row, groups in zip(tokens_NT1.tolist(), groups_NT.tolist(), strict=True):
        last: dict[int, int] = {}
        for at, group in enumerate(groups):
            if at % 2:
                assert group == KEY
                continue
            expected = UNSEEN if row[at] not in last else FIRST_BUCKET + bucket((at - last[row[at]]) // 2)
            assert group == expected
            last[row[at]] = at


class IdealReader:
    """An engine whose logits are what the reader of docs/theory A.11 knows. T targets: after a key, its value."""

    device = torch.device("cpu")

    def eval(self) -> None: ...

    def train(self) -> None: ...

    def __call__(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        p = torch.zeros(*tokens_BT.shape, 17)
        keys_K = torch.from_numpy(key_probabilities(corpus())).float()
        for row, tokens in enumerate(tokens_BT.tolist()):
            known: dict[int, int] = {}
            for at, token in enumerate(tokens):
                if at % 2:
                    known[tokens[at - 1]] = token
                    p[row, at, :12] = keys_K
                elif token in known:
                    p[row, at, known[token]] = 1
                else:
                    p[row, at, 12:] = 1 / 5
        return p.log()


@pytest.fixture
def _alone() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_alone")
def test_the_evaluation_of_an_ideal_reader_is_the_exact_table(prepared: PreparedData) -> None:
    found = Pretraining(pretrain(), prepared).evaluate(IdealReader())
    table = json.loads(found.texts["recall.json"])
    assert set(found.record) == {"held_out_loss_nats"}  # bits per byte: of no text
    assert found.measures["ideal_loss_nats"] == table["ideal_loss_nats"]
    assert found.loss_nats == pytest.approx(table["loss_nats"], rel=1e-5)
    assert found.loss_nats == pytest.approx(table["ideal_loss_nats"], rel=0.05)
    keys, unseen, *seen = table["groups"]
    assert keys["loss_nats"] == pytest.approx(keys["ideal_loss_nats"], rel=0.1)
    assert unseen["loss_nats"] == pytest.approx(math.log(5), rel=1e-5)
    assert [each["loss_nats"] for each in seen] == pytest.approx([0.0] * 4, abs=1e-6)
    assert [each["distance_tokens"] for each in seen] == [[0, 2], [2, 4], [4, 8], [8, 16]]
    total = sum(each["targets"] for each in table["groups"])
    assert total == 79 * 16  # all held-out windows but the last, which has no next token
    for each in table["groups"]:
        assert each["targets"] / total == pytest.approx(each["share"], abs=0.03)
    assert found.measures["recall_value_unseen_loss_nats"] == unseen["loss_nats"]


@pytest.mark.usefixtures("_alone")
def test_a_group_without_targets_has_no_loss(tmp_path: Path) -> None:
    config = pretrain(context=512, document_tokens=512, held_out_documents=2, exponent=10.0)
    found = Pretraining(config, prepare(config.data, tmp_path, 512)).evaluate(IdealReader())
    table = json.loads(found.texts["recall.json"])
    empty = [each["name"] for each in table["groups"] if each["targets"] == 0]
    assert empty
    for each in table["groups"]:
        assert (each["loss_nats"] is None) == (each["name"] in empty)
        assert (f"recall_{each['name']}_loss_nats" in found.measures) == (each["name"] not in empty)
