"""What a user may write: derived values, and one clear refusal for each mistake."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from escala.schema import DataConfig, ModelConfig, PretrainConfig, TrainingConfig


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


def test_experts_derive_what_is_left_open() -> None:
    model = ModelConfig(d_ff=96, n_layers=5, moe={"every": 2})
    assert model.moe is not None
    assert (model.expert_size, model.moe.trained_experts, model.moe.collapse_ratio) == (96, 2, 2.5)
    assert [model.has_experts(layer) for layer in range(5)] == [False, True, False, True, False]
    soft = ModelConfig(moe={"estimator": "soft_to_hard"})
    assert soft.moe is not None
    assert (soft.moe.capacity_factor, soft.moe.trained_experts) == (None, 8)
    assert soft.moe.tau is not None
    assert ModelConfig(**soft.model_dump()) == soft


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": 4, "chosen": 4}, "is a dense layer"),
        ({"estimator": "gumbel", "noise_std": 0.1}, "draws its own noise"),
        ({"estimator": "soft_to_hard", "capacity_factor": 1.0}, "every token to every expert"),
        ({"estimator": "top_k", "tau": {"end": 0.5}}, "has no temperature"),
        ({"estimator": "gumbel", "tau": {"start": 0.1, "end": 1.0}}, "tau rises"),
        ({"capacity_factor": None, "hinge_weight": 0.1}, "give capacity_factor"),
        ({"margin": 0.1}, "go together"),
        ({"margin_weight": 0.1}, "go together"),
        ({"collapse_load_ratio": 4.0}, "never exceeded"),
        ({"every": 9}, "leaves no layer"),
        ({"expert": 4}, "Extra inputs"),
    ],
)
def test_experts_that_contradict_themselves_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(moe=values)


@pytest.mark.parametrize(
    ("workers", "stage", "message"),
    [(3, 2, "8 experts, 3 workers"), (2, 3, "stages 0 to 2"), (2, 2, None), (1, 3, None)],
)
def test_experts_are_shared_by_workers_that_can(workers: int, stage: int, message: str | None) -> None:
    values = {
        "model": {"moe": {"expert_parallel": True}},
        "training": {"zero_stage": stage, "batch_sequences": 6},
        "resources": {"workers": workers},
    }
    if message is None:
        assert PretrainConfig.model_validate(values).model.moe is not None
        return
    with pytest.raises(ValidationError, match=message):
        PretrainConfig.model_validate(values)


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
