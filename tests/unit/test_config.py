"""What a user may write: derived values, and one clear refusal for each mistake."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from workloads.config import DataConfig, ModelConfig, PretrainConfig, TrainingConfig


def test_derived_sizes() -> None:
    model = ModelConfig(d_model=96, n_heads=6)
    assert (model.kv_heads, model.head_size, model.ff_size) == (6, 16, 256)
    assert ModelConfig(**model.model_dump()) == model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 100, "n_heads": 3}, "set head_dim"),
        ({"n_heads": 4, "n_kv_heads": 3}, "multiple of n_kv_heads"),
        ({"d_model": 12, "n_heads": 4}, "RoPE turns pairs"),
        ({"n_layer": 3}, "Extra inputs"),
        ({"n_heads": 0}, "greater than 0"),
    ],
)
def test_a_model_that_cannot_be_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**values)


def test_a_length_is_given_once() -> None:
    assert PretrainConfig().total_steps == 100
    assert PretrainConfig(training=TrainingConfig(steps=7)).total_steps == 7
    with pytest.raises(ValidationError, match="not both"):
        TrainingConfig(steps=3, train_tokens=10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"steps": 1, "context_tokens": 512}}, "longer than"),
        ({"training": {"steps": 1, "batch_sequences": 6}, "resources": {"workers": 4}}, "not a multiple of"),
        ({"training": {"steps": 1}, "model": {"vocab_size": 1024}}, "does not fit"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PretrainConfig.model_validate(values)


def test_tokens_round_up_to_whole_steps() -> None:
    training = {"train_tokens": 10_000, "batch_sequences": 8, "context_tokens": 128}
    config = PretrainConfig.model_validate({"training": training, "resources": {"workers": 2}})
    assert (config.total_steps, config.train_tokens, config.micro_batch_sequences) == (10, 10_240, 4)


def test_corpora_are_told_apart_by_kind() -> None:
    data = DataConfig.model_validate({"corpora": [{"kind": "files", "root": "x"}, {"kind": "python_source"}]})
    assert [corpus.kind for corpus in data.corpora] == ["files", "python_source"]
    with pytest.raises(ValidationError, match="text_key"):
        DataConfig.model_validate({"corpora": [{"kind": "files", "root": "x", "text_key": "t"}]})
