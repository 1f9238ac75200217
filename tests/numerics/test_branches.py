"""Branches of one trunk, trained as a sweep trains them, are bit for bit the runs that they would be alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from escala import spec
from escala.contract.records import AttemptSpec, JobFiles, Outcome, TrialFiles, TrunkFiles
from escala.storage.checkpoints import list_checkpoints, open_checkpoints
from escala.sweeps import design, trials
from escala.sweeps.points import read_points
from escala.sweeps.space import Space
from escala.sweeps.trials import PlannedTrial
from escala.sweeps.tuner import identify
from workloads import trial as workload

STEPS, STEP_TOKENS = (24, 48, 96), 128
SPACE = {
    "branch": "tokens",
    "vary": {"tokens": [steps * STEP_TOKENS for steps in STEPS]},
    "base": {
        "model": {"vocab_size": 300, "n_layers": 2, "d_model": 16, "n_heads": 2, "max_context_tokens": 32},
        "data": {"tokenizer": {"vocab_size": 300, "train_characters": 50_000}, "held_out_fraction": 0.2},
        "training": {
            "batch_sequences": 4,
            "evaluation_tokens": 512,
            "optimizer": {"schedule": "wsd", "learning_rate": 3e-3},
        },
    },
}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A trial's process keeps its process group for the next one; this one gives it back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Sweep:
    """One home's sweep, without Ray."""

    def __init__(self, home: Path, corpus: Path, store: Path) -> None:
        keys: dict[str, Any] = spec.merge(
            SPACE, {"base": {"data": {"corpora": [{"kind": "jsonl", "path": str(corpus)}]}}}
        )
        space: Space = spec.validate(Space, keys, "space")
        self.home, directory = home, JobFiles(home, "j").attempt(1).directory
        directory.mkdir(parents=True)
        self.spec = AttemptSpec(
            job_id="j", attempt=1, name="s", workload="sweep", entry_point="", config={}, directory=str(directory),
            checkpoints="", data=str(store), tracking_uri="", experiment="e",
        )  # fmt: skip
        planned = design.plan(space)
        first = replace(
            self.spec, workload="pretrain", entry_point="workloads.pretrain", config=planned[0].config
        )
        self.data = workload.prepare(first)
        self.planned = [identify(n, t, self.data.fingerprints) for n, t in enumerate(planned, 1)]
        trials.write_planned(home, "j", self.planned)

    def train(self, one: PlannedTrial) -> Outcome:
        attempt = trials.new_attempt(
            TrialFiles(self.home, one.fingerprint), "pretrain", "law", self.spec, one
        )
        return workload.run(attempt, self.data)


def said(outcome: Outcome) -> dict[str, Any]:
    """What a run says of itself, without its times and what it spent."""
    assert outcome.record is not None, outcome.message
    same = (
        "held_out_loss_nats",
        "train_loss_nats",
        "initial_held_out_loss_nats",
        "train_tokens",
        "compute_flops",
    )
    return {key: outcome.record[key] for key in same}


def test_branches_are_the_runs_alone_and_a_killed_one_goes_on_from_its_trunk(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = [" ".join(f"{n * n % 97} and {n * i % 997} make {n % 7}." for n in range(30)) for i in range(300)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    together = Sweep(tmp_path / "together", corpus, tmp_path / "data")
    assert [p.trial.train_tokens for p in together.planned] == [steps * STEP_TOKENS for steps in STEPS]
    trunk = TrunkFiles(together.home, str(together.planned[0].trunk))
    branches = [together.train(one) for one in together.planned[:2]]
    store = open_checkpoints(trunk.checkpoints)
    (kept,) = list_checkpoints(store)
    assert kept.step == 48 - 1 - 10  # the last step at the peak: the last fifth decays
    branches.append(together.train(together.planned[2]))
    alone = Sweep(tmp_path / "alone", corpus, tmp_path / "data")
    runs = [alone.train(replace(one, trunk=None)) for one in alone.planned]
    assert [said(outcome) for outcome in branches] == [said(outcome) for outcome in runs]
    assert len({said(outcome)["held_out_loss_nats"] for outcome in runs}) == 3

    points = read_points(together.home, "j").points
    assert points["trunk"].unique().tolist() == [together.planned[0].trunk]
    assert points["spent_flops"].tolist() == pytest.approx([p.trial.own_flops for p in together.planned])
    assert points["spent_flops"].sum() < 0.7 * points["compute_flops"].sum()

    again = together.train(together.planned[0])  # its own steps lie before what the trunk holds now
    assert said(again) == said(runs[0])
    assert again.record["attempt_flops"] == runs[0].record["attempt_flops"]
    again = together.train(together.planned[2])  # as after a kill: from its trunk, whose step it has reached
    assert said(again) == said(runs[2])
    assert again.record["attempt_flops"] == pytest.approx(20 / 96 * runs[2].record["compute_flops"])
    assert again.checkpoint is None  # a trunk's goes with the trunk
    trials.end_trunk(together.home, "j", together.planned[0].trunk)
    assert list_checkpoints(store) == []
