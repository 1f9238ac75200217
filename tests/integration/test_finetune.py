"""On the session's cluster: pretraining, then SFT with LoRA, a reward model and DPO, each from the one before."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from escala import Escala
from escala.contract.errors import CheckpointError, SpecError
from escala.contract.records import JobFiles
from escala.settings import Settings
from escala.storage.checkpoints import latest, open_checkpoints
from escala.views.jobs import JobDetailsView
from escala.views.run_records import RunView
from tests.faults.victims import ended
from workloads.model.start import load_model, load_tokenizer
from workloads.model.weights import load_weights
from workloads.rewards.model import RewardModelScorer
from workloads.rewards.reward_model import load_reward_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

GOOD, BAD = ("fine", "kind", "warm"), ("poor", "cruel", "cold")
TRAINING = "training={context_tokens: 48, batch_sequences: 8, checkpoint_every_steps: 20, "


def submit(workload: str, data: Path, *overrides: str) -> str:
    return Escala().submit(workload, (), [f"data={{train: {data}, held_out_fraction: 0.2}}", *overrides]).id


def finished(job_id: str) -> RunView:
    """The record of a job that must succeed."""
    job = ended(job_id)
    assert job.job.state == "succeeded", job.job.message
    return Escala().finished_run(job.job.id)


@pytest.fixture(scope="module")
def pretrained(undisturbed: JobDetailsView) -> str:
    return undisturbed.job.id


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Chats and preferences about nothing much: good words are preferred."""
    directory, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    chats, pairs = [], []
    for number in range(120):
        good, bad = draw.choice(GOOD), draw.choice(BAD)
        prompt = f"How is day {number}?"
        chats.append(
            {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": f"It is {good}."},
                ]
            }
        )
        pairs.append({"prompt": prompt + "\n", "chosen": f"It is {good}.", "rejected": f"It is {bad}."})
    found = {}
    for name, rows in (("chats", chats), ("pairs", pairs)):
        found[name] = directory / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.fixture(scope="module")
def tuned(pretrained: str, data: dict[str, Path]) -> RunView:
    """SFT by LoRA on two workers under ZeRO-3."""
    job = submit(
        "sft",
        data["chats"],
        f"start.job={pretrained}",
        "lora={rank: 4, targets: [query, value, down]}",
        TRAINING + "steps: 40, zero_stage: 3, optimizer: {learning_rate: 1e-2}}",
        "resources.workers=2",
    )
    return finished(job)


@pytest.fixture(scope="module")
def preferring(tuned: RunView, data: dict[str, Path]) -> dict[str, str]:
    """By workload, the jobs that learn the preferences: both at once, while the tests go on."""
    start, steps = f"start.job={tuned.job_id}", {"reward": (30, 3e-3), "dpo": (20, 1e-3)}
    return {
        workload: submit(
            workload, data["pairs"], start, TRAINING + f"steps: {n}, optimizer: {{learning_rate: {rate}}}}}"
        )
        for workload, (n, rate) in steps.items()
    }


def test_sft_with_lora_lowers_the_answers_loss_and_saves_deltas_alone(tuned: RunView) -> None:
    assert tuned.held_out_loss_nats < 0.5 * tuned.initial_held_out_loss_nats
    assert 0 < tuned.n_trained < 0.2 * tuned.n_total
    checkpoints = JobFiles(Settings().home, tuned.job_id).checkpoints
    newest, _ = latest(open_checkpoints(checkpoints))
    assert newest is not None
    assert all(".lora_" in name for name in load_weights(newest))
    model, tokenizer = load_model(checkpoints), load_tokenizer(checkpoints)
    assert sum(p.numel() for p in model.parameters()) == tuned.n_total  # merged
    assert tokenizer.prompt([{"role": "user", "content": "x"}])


@pytest.mark.usefixtures("preferring")  # they train meanwhile
def test_it_opens_in_transformers_and_peft(tuned: RunView, pretrained: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        expected = load_model(JobFiles(Settings().home, tuned.job_id).checkpoints)(ids)
        whole = AutoModelForCausalLM.from_pretrained(Escala().export(tuned.run_id, tmp_path / "whole"))
        assert torch.allclose(whole(ids).logits, expected, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(Escala().export(pretrained, tmp_path / "base"))
        deltas = PeftModel.from_pretrained(
            base, Escala().export(tuned.job_id, tmp_path / "deltas", adapter=True)
        )
        assert torch.allclose(deltas(ids).logits, expected, atol=1e-4)
    template = AutoTokenizer.from_pretrained(tmp_path / "whole").apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True
    )
    tokenizer = load_tokenizer(JobFiles(Settings().home, tuned.job_id).checkpoints)
    assert template["input_ids"] == tokenizer.prompt([{"role": "user", "content": "x"}])
    with pytest.raises(SpecError, match="not empty"):
        Escala().export(tuned.job_id, tmp_path / "whole")
    with pytest.raises(CheckpointError, match="no deltas"):
        Escala().export(pretrained, tmp_path / "none", adapter=True)


def test_a_reward_model_starts_from_it_and_prefers_what_raters_did(preferring: dict[str, str]) -> None:
    record = finished(preferring["reward"])
    assert record.measures["held_out_accuracy"] > 0.9
    assert record.held_out_loss_nats < 0.5 * record.initial_held_out_loss_nats
    model, tokenizer = load_reward_model(JobFiles(Settings().home, record.job_id).checkpoints)
    good, bad = RewardModelScorer(model, tokenizer).score(
        ["How is day 7?\n"] * 2, ["It is kind.", "It is cruel."]
    )
    assert good > bad


def test_dpo_starts_from_it_and_raises_the_margin(preferring: dict[str, str]) -> None:
    record = finished(preferring["dpo"])
    assert record.initial_held_out_loss_nats == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference
    assert record.measures["held_out_accuracy"] > 0.9
    assert record.measures["held_out_reward_margin"] > 0
