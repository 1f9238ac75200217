"""`escala demo rlhf`: a small model, pretrained here, learns from real people's ratings what to say."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import typer

from escala.cli import progress, render
from escala.cli.home import open_home
from escala.cli.jobs import follow_job

if TYPE_CHECKING:
    from escala.client import Escala
    from escala.views.run_records import RunDetailsView

MODEL = {"vocab_size": 2048, "n_layers": 3, "d_model": 128, "n_heads": 4, "max_context_tokens": 64}
PAIRS = 20_000
PRETRAINING = {
    "model": MODEL,
    "data": {"tokenizer": {"vocab_size": MODEL["vocab_size"]}, "max_characters": 8_000_000},
    "training": {"steps": 300, "batch_sequences": 32, "evaluation_tokens": 16_384},
}
ANSWERING = {"steps": 600, "batch_sequences": 8, "optimizer": {"learning_rate": 1e-3}}
JUDGING = {"steps": 400, "batch_sequences": 64, "optimizer": {"learning_rate": 1e-3}}
REINFORCING: dict[str, Any] = {
    "sampling": {"max_response_tokens": 12},
    "batch": {"prompts": 64, "epochs": 2, "minibatches": 2},
    "advantage": {"bootstrap": False},  # the critic starts as the reward model
    "shaping": {"missing_eos_penalty": 1.0},
    "kl": {"coefficient": 0.2},
    "training": {"steps": 40, "optimizer": {"learning_rate": 3e-4}},
    "rollouts": {"replica_cpus": 0.5},
    "resources": {"workers": 2, "cpus_per_worker": 0.5},
}
GOLD = "workloads.data.raters:held_out_score"
SHOWN = 4  # samples of the first and the last iteration


def run() -> None:
    """Ratings to pairs, pretraining, SFT and a reward model side by side, PPO, and what changed."""
    escala = open_home()
    directory = escala.settings.home / "demo-rlhf"
    render.step(f"1. what people feel about words: {PAIRS:,} comparisons by real raters")
    make = [sys.executable, "-m", "workloads.data.raters", "--to", str(directory), "--pairs", str(PAIRS)]
    if subprocess.run(make).returncode:
        raise typer.Exit(1)

    render.step("2. a small model, pretrained on Python source")
    base = _submitted(escala, "pretrain", PRETRAINING, "rlhf-base")
    answers = {"train": directory / "answers.jsonl", "held_out": directory / "held_out_answers.jsonl"}
    answering = {"data": {name: str(path) for name, path in answers.items()}, "training": ANSWERING}
    policy = _submitted(escala, "sft", {"start": {"job": base}, **answering}, "rlhf-policy")
    pairs = {"train": str(directory / "train.jsonl"), "held_out": str(directory / "other_raters.jsonl")}
    judging = {"data": pairs, "training": JUDGING}
    reward = _submitted(escala, "reward", {"start": {"job": base}, **judging}, "rlhf-reward")
    _ended(escala, base)

    render.step("3. it learns to answer (SFT), and a copy of it what raters prefer (reward model)")
    _ended(escala, policy)
    judged = _ended(escala, reward)
    accuracy = (judged.measures or {})["held_out_accuracy"]
    render.raw(f"raters whom it has not seen agree with the reward model on {accuracy:.1%} of pairs of words")

    render.step("4. PPO: rollouts from Serve, ZeRO-3 on two workers")
    rewards = [{"kind": "model", "job": reward}, {"kind": "function", "function": GOLD, "weight": 0}]
    prompts = str(directory / "prompts.jsonl")
    critic = {"start": {"job": reward}, "learning_rate": 1e-3}
    built = {
        "start": {"job": policy},
        "critic": critic,
        "prompts": prompts,
        "rewards": rewards,
        **REINFORCING,
    }
    learned = _ended(escala, _submitted(escala, "ppo", built, "rlhf"))

    render.step("5. before and after")
    _compare(escala, learned)


def _submitted(escala: Escala, workload: str, spec: dict[str, Any], name: str) -> str:
    with progress.reporting("submitting", False) as report:
        return escala.submit(workload, base=spec, options={"name": name}, report=report).id


def _ended(escala: Escala, job: str) -> RunDetailsView:
    """The run of a job that is followed to its end. Exits with 1 where it fails."""
    follow_job(escala, job)
    with progress.working("waiting for the run's record in MLflow"):
        return escala.finished_run(job)


def _compare(escala: Escala, learned: RunDetailsView) -> None:
    rows = []
    for name, metric in (
        ("reward model's score", "reward_served"),
        ("raters whom it never saw, -4 to 4", "reward_held_out_score"),
        ("KL from the start, nats a response", "kl_nats"),
        ("tokens a response", "response_tokens"),
    ):
        points = escala.history(str(learned.run_id), metric)
        rows.append((name, *(render.number(value) for _, value in (points[0], points[-1]))))
    render.table(("", "before", "after"), rows)
    found = escala.samples(str(learned.run_id))
    for when, some in (("before", found[:SHOWN]), ("after", found[-SHOWN:])):
        render.raw(f"{when:<8}{'  '.join(repr(row.response) for row in some)}")
    render.page(learned.url)
    render.raw(
        f"next            escala runs samples {learned.job_id}; escala export {learned.job_id} --to DIR"
    )
