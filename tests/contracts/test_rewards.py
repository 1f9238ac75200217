"""What every registered kind of reward must do: `escala.schema.rewards` beside `workloads.rewards`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

import escala.schema.rewards
import workloads.rewards
from escala import spec
from escala.schema import ModelConfig, get_workload
from escala.schema.rewards import KINDS, Needs, RewardConfig
from tests.kind_files import kind_of_two_files
from workloads.alignment.rollouts import Response, Scoring, served_rewards
from workloads.data.chat import ChatTokenizer
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.tokenizer import train_tokenizer
from workloads.model.huggingface import save_pretrained
from workloads.model.transformer import Transformer
from workloads.preflight import problems
from workloads.rewards.reward_model import RewardModel, save_reward_model
from workloads.rewards.scoring import build_reward, make_reward

PROMPTS, RESPONSES = ["one", "one", "two", "two"], ["a", "b and a", "c", "c d"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a reward model and a chat model."""
    directory = tmp_path_factory.mktemp("models")
    train_tokenizer(["Which is better, A or B? one two a b c d"], 300).save(str(directory / "words.json"))
    tokenizer: ChatTokenizer = load_chat_tokenizer(directory / "words.json")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=300, n_layers=1, d_model=16, n_heads=2, max_context_tokens=256)
    save_reward_model(RewardModel(Transformer(config)), tokenizer, directory / "reward")
    save_pretrained(Transformer(config), directory / "chat")
    tokenizer.save(directory / "chat")
    return directory


SECTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "function": lambda at: {"kind": "function", "function": "tests.reward_functions:lengths"},
    "model": lambda at: {"kind": "model", "model": str(at / "reward")},
    "judge": lambda at: {"kind": "judge", "judge": {"model": str(at / "chat")}},
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


@each_kind
def test_a_section_is_read_as_it_was_written(kind: str, models: Path) -> None:
    adapter = TypeAdapter(RewardConfig)
    section = adapter.validate_python({**SECTIONS[kind](models), "weight": -2})
    plain = adapter.dump_python(section, mode="json")
    assert plain["kind"] == kind
    assert adapter.validate_python(plain) == section
    assert section.weight == -2.0
    assert section.contradiction(2) is None


@each_kind
def test_it_scores_each_response(kind: str, models: Path) -> None:
    section = KINDS.read(SECTIONS[kind](models))
    reward = make_reward(section, timeout_seconds=60.0)
    scores = reward.score(PROMPTS, RESPONSES)
    assert len(scores) == 4
    assert all(type(score) is float and math.isfinite(score) for score in scores)
    backwards = reward.score(PROMPTS[::-1], RESPONSES[::-1], 60.0)
    assert backwards[::-1] == pytest.approx(scores, abs=1e-6)
    doubled = KINDS.read({**SECTIONS[kind](models), "weight": 2})
    assert build_reward([doubled], torch.device("cpu")).score(PROMPTS, RESPONSES) == pytest.approx(
        [2 * score for score in scores]
    )


@each_kind
def test_what_it_needs_is_looked_for_before_the_job_is_queued(
    kind: str, models: Path, tmp_path: Path
) -> None:
    assert problems({}, {"rewards": [SECTIONS[kind](models)], "prompts": None}, False) == []
    needs = KINDS.read(SECTIONS[kind](tmp_path / "nowhere")).needs()
    assert needs != Needs()
    found = problems({}, {"rewards": [SECTIONS[kind](tmp_path / "nowhere")], "prompts": None}, False)
    assert len(found) == len(needs.models)


@each_kind
def test_a_served_kind_takes_a_replica(kind: str, models: Path) -> None:
    config = {"rollouts": {"replicas": 2, "replica_cpus": 1.0, "replica_gpus": 0.5}}
    config["rewards"] = [SECTIONS[kind](models)]  # type: ignore[assignment]
    assert get_workload("ppo").sidecar_needs(config)["CPU"] == (3.0 if KINDS[kind].is_served else 2.0)


SCHEMA = """
    from typing import ClassVar, Literal

    from escala.schema.rewards.kind import KINDS, RewardKind


    @KINDS.add
    class EndingRewardConfig(RewardKind):
        is_served: ClassVar[bool] = False

        kind: Literal["ending"]
        text: str
"""
IMPLEMENTATION = """
    class EndingReward:
        def __init__(self, text):
            self.text = text

        def score(self, prompts, responses, timeout_seconds=None):
            return [float(response.endswith(self.text)) for response in responses]


    def make_reward(section, device, timeout_seconds):
        return EndingReward(section.text)
"""


@pytest.fixture
def ending_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A kind of two files: its schema and what computes it."""
    files = {escala.schema.rewards: SCHEMA, workloads.rewards: IMPLEMENTATION}
    with kind_of_two_files("ending", KINDS, files, tmp_path, monkeypatch) as kind:
        yield kind


def test_a_new_kind_is_two_files(ending_kind: str) -> None:
    rewards = [{"kind": "ending", "text": "b", "weight": 3}]
    base = {"prompts": "p.jsonl", "tokenizer": "t.json", "rewards": rewards, "advantage": {"kind": "rloo"}}
    base |= {"batch": {"prompts": 2, "responses_per_prompt": 2}, "model": {"max_context_tokens": 256}}
    config = spec.load_job("ppo", base=base).config
    assert served_rewards(config) == []
    assert get_workload("ppo").sidecar_needs(config.model_dump(mode="json"))["CPU"] == 1.0
    responses = [Response(0, i, "p", [1], [2], text, [0.0], True, 0) for i, text in enumerate(("a b", "b a"))]
    scores = Scoring(config).score(None, responses)
    assert scores.parts == {"ending": [1.0, 0.0]}
    assert scores.sums == [3.0, 0.0]
