"""The synthetic text: the same bytes everywhere, the same prefix at every length, as corpus and as tokens."""

from __future__ import annotations

import hashlib

import pytest

from escala.schema import DataConfig, SyntheticCorpus
from workloads.data.corpus import read_documents
from workloads.data.synthetic import DOCUMENT_LETTERS, LETTERS, documents, entropy_nats
from workloads.data.tokenizer import train_tokenizer, wrap


def test_the_text_is_the_same_on_every_machine() -> None:
    digest = hashlib.sha256("".join(documents(64)).encode()).hexdigest()
    assert digest == "f9c8fe299fa810572b788d035e9240a170d1d257f31edd354381cfada2382839"
    assert entropy_nats(64) == pytest.approx(1.998, abs=0.01)


def test_a_shorter_text_is_the_head_of_a_longer_one() -> None:
    assert list(documents(600))[:5] == list(documents(5))
    assert {len(text) for text in documents(5)} == {DOCUMENT_LETTERS}
    assert set("".join(documents(64))) == set(LETTERS)


def test_it_is_read_to_whole_documents_and_a_letter_is_a_token() -> None:
    config = DataConfig(corpora=[SyntheticCorpus(kind="synthetic", characters=5000)])
    found = list(read_documents(config.corpora[0], config))
    assert [d.text for d in found] == list(documents(3))
    tokenizer = wrap(train_tokenizer([found[0].text], 257), "bytes")
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode([found[0].text])[0]) == DOCUMENT_LETTERS
