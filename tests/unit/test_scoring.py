"""Rewards by one interface: functions, sums, a reward model. Their configuration."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from escala.contract.errors import CheckpointError, DataError, SpecError
from escala.schema import ModelConfig
from escala.schema.compression import StoredWeights
from escala.schema.rewards import RewardConfig
from escala.schema.rewards.judge import JudgeModelConfig
from tests.unit.small_chat import END, ByteChat
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.dialogues import Prompt
from workloads.data.tokenizer import train_tokenizer
from workloads.model.compression.layers import decompress_model
from workloads.model.transformer import Transformer
from workloads.rewards.function import FunctionReward
from workloads.rewards.model import RewardModelScorer, store_trunk
from workloads.rewards.reward_model import (
    HEAD_FILE,
    RewardModel,
    answer_tokens,
    load_reward_model,
    pad_right,
    save_reward_model,
)
from workloads.rewards.scoring import WeightedSum, build_reward
from workloads.rewards.user_functions import CODE

SMALL = ModelConfig(vocab_size=END + 1, n_layers=2, d_model=16, n_heads=2, max_context_tokens=64)
CHAT: list[Prompt] = [[{"role": "user", "content": "2 + 2?"}], "Once"]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user's module of reward functions, as a job finds it."""
    (tmp_path / "rewards_of_mine.py").write_text(
        "def length(prompts, responses): return [len(r) for r in responses]\n"
        "def fails(prompts, responses): return [1 / len(r) for r in responses]\n"
        "def short(prompts, responses): return [1.0]\n"
        "def words(prompts, responses): return ['good' for _ in responses]\n"
        "def infinite(prompts, responses): return [0.0, float('inf')]\n"
        "constant = 3\n"
    )
    monkeypatch.setenv(CODE, str(tmp_path))


def reward_model(seed: int = 0, tie: bool = True) -> RewardModel:
    torch.manual_seed(seed)
    return RewardModel(Transformer(SMALL.model_copy(update={"tie_embeddings": tie})))


def test_a_function_rewards(module: None) -> None:
    assert FunctionReward("rewards_of_mine:length").score(["", ""], ["ab", ""]) == [2.0, 0.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module_here:f", "can't be imported: ModuleNotFoundError"),
        ("rewards_of_mine:absent", "is not there"),
        ("rewards_of_mine:constant", "is no function but int"),
        ("rewards_of_mine:fails", "raised ZeroDivisionError: division by zero"),
        ("rewards_of_mine:short", "returned 1 rewards for 2 responses"),
        ("rewards_of_mine:words", "returned 'good' for response 1"),
        ("rewards_of_mine:infinite", "returned inf for response 2"),
    ],
)
def test_a_function_that_fails_is_named(module: None, name: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        FunctionReward(name).score(["", ""], ["a", ""])
    assert name in caught.value.message
    assert words in caught.value.message


def test_weighted_sums_and_a_spec_of_two_rewards(module: None) -> None:
    length = FunctionReward("rewards_of_mine:length")
    sums = WeightedSum([(0.5, length), (-2.0, WeightedSum([(1.0, length), (1.0, length)]))])
    assert sums.score(["", ""], ["abcd", "a"]) == [2.0 - 16, 0.5 - 4]
    sections = TypeAdapter(list[RewardConfig]).validate_python(
        [
            {"kind": "function", "function": "rewards_of_mine:length"},
            {"kind": "function", "function": "rewards_of_mine:length", "weight": -0.25},
        ]
    )
    assert build_reward(sections, torch.device("cpu")).score([""], ["abcd"]) == [3.0]
    with pytest.raises(SpecError, match="needs one at least"):
        WeightedSum([])


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "oracle"}, "does not match any of the expected tags"),
        ({"kind": "function", "function": "no colon"}, "String should match pattern"),
        ({"kind": "function", "function": "a:b", "weight": math.inf}, "finite number"),
        ({"kind": "model", "model": "x", "function": "a:b"}, "Extra inputs are not permitted"),
        (
            {"kind": "judge", "judge": {"model": "x", "question": "{prompt} {first}"}},
            "must hold {prompt}, {first}",
        ),
        ({"kind": "judge", "judge": {"model": "x", "question": "{prompt"}}, "the question is no template"),
    ],
)
def test_a_wrong_section_says_what_is_wrong(section: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(RewardConfig).validate_python(section)
    assert words in str(caught.value)


def test_the_question_that_is_asked_by_default_is_valid() -> None:
    assert "{first}" in JudgeModelConfig(model="x").question


@pytest.mark.parametrize("tie", [True, False])
def test_the_score_is_read_on_the_last_valid_token(tie: bool) -> None:
    model = reward_model(tie=tie)
    rows = [[1, 2, 3, 4, 5], [6, 7], [8]]
    tokens_BT, lengths_B = pad_right(rows, END, torch.device("cpu"))
    scores_B = model(tokens_BT, lengths_B)
    alone = [model(torch.tensor([row]), torch.tensor([len(row)])) for row in rows]
    torch.testing.assert_close(scores_B, torch.cat(alone))
    states_BTD = model.trunk.hidden(torch.tensor([rows[0]]))
    torch.testing.assert_close(scores_B[0], states_BTD[0, -1] @ model.head.weight[0])
    tokens_BT[1, 2:] = 9
    torch.testing.assert_close(model(tokens_BT, lengths_B), scores_B)
    assert scores_B.abs().max() < 1  # a small start


@pytest.mark.parametrize("tie", [True, False])
def test_every_parameter_of_a_reward_model_is_trained(tie: bool) -> None:
    model = reward_model(tie=tie)
    tokens_BT, lengths_B = pad_right([[1, 2, 3], [4, 5]], END, torch.device("cpu"))
    model(tokens_BT, lengths_B).sum().backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert untrained == []


def test_what_a_reward_model_reads() -> None:
    tokenizer = ByteChat()
    assert answer_tokens(tokenizer, "Once", " upon") == [*b"Once upon", END]
    assert answer_tokens(tokenizer, CHAT[0], "4") == [*b"u>2 + 2?", END, *b"a>4", END]


def test_the_scorer_batches_by_length_and_keeps_the_order() -> None:
    model, tokenizer = reward_model(), ByteChat()
    prompts, responses = CHAT * 4, [f"{'x' * (7 * i % 11)}{i}" for i in range(8)]
    model.train()
    scores = RewardModelScorer(model, tokenizer, batch_sequences=3).score(prompts, responses)
    assert not model.training
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        ids = answer_tokens(tokenizer, prompt, response)
        expected = model(torch.tensor([ids]), torch.tensor([len(ids)]))
        assert score == pytest.approx(expected.item(), abs=1e-6)
    assert len({round(score, 6) for score in scores}) == 8
    with pytest.raises(DataError, match="has 71 tokens, more than the reward model's 64"):
        RewardModelScorer(model, tokenizer).score(["a" * 60], ["b" * 10])


def test_a_saved_reward_model_scores_the_same(tmp_path: Path) -> None:
    train_tokenizer(["some words to make a tokenizer of"], 300).save(str(tmp_path / "words.json"))
    tokenizer = load_chat_tokenizer(tmp_path / "words.json")
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300, n_layers=1, d_model=16, n_heads=2, max_context_tokens=64, tie_embeddings=False
    )
    model = RewardModel(Transformer(config))
    save_reward_model(model, tokenizer, tmp_path)
    sections = TypeAdapter(list[RewardConfig]).validate_python(
        [{"kind": "model", "model": str(tmp_path), "weight": 2}]
    )
    found = build_reward(sections, torch.device("cpu")).score(["p"], ["r"])
    assert found == pytest.approx([2 * s for s in RewardModelScorer(model, tokenizer).score(["p"], ["r"])])
    wide = nn.Linear(32, 1, bias=False)
    rewards_of_another = {"weight": wide.weight.detach()}
    from safetensors.torch import save_file

    save_file(rewards_of_another, tmp_path / HEAD_FILE)
    with pytest.raises(CheckpointError, match=r"has the shape \(1, 32\), its trunk needs \(1, 16\)"):
        load_reward_model(tmp_path)
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(CheckpointError, match="can't be read as a reward model's head"):
        load_reward_model(tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_a_reward_model_in_another_precision_scores_as_its_weights_say(precision: str) -> None:
    torch.manual_seed(0)
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 96}  # which groups of 32 divide
    config = ModelConfig(vocab_size=END + 1, max_context_tokens=64, **shape)
    model, tokenizer = RewardModel(Transformer(config)), ByteChat()
    plain = RewardModelScorer(model, tokenizer).score(["p"], ["response"])
    store_trunk(model, StoredWeights.model_validate({"precision": precision}), tokenizer)
    scores = RewardModelScorer(model, tokenizer).score(["p"], ["response"])
    assert scores == pytest.approx(plain, abs=0.05)
    assert scores != plain
    assert model.trunk.unembedding is None
    if precision != "bf16":
        model.trunk = decompress_model(model.trunk)
        assert RewardModelScorer(model, tokenizer).score(["p"], ["response"]) == pytest.approx(
            scores, abs=1e-6
        )


def test_an_exported_reward_model_says_how_it_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from escala.cli import render

    render.exported(tmp_path, False)
    assert "AutoModelForCausalLM" in capsys.readouterr().err
    (tmp_path / HEAD_FILE).touch()
    render.exported(tmp_path, False)
    said = capsys.readouterr().err
    assert "load_reward_model" in said
    assert "AutoModelForCausalLM" not in said
