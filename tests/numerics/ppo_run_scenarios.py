"""What test_ppo_run.py looks at, on one rank.

Whole runs of `workloads.ppo` with one engine in this process for the rollout service.
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from escala.contract.errors import EscalaError
from escala.contract.records import AttemptFiles, AttemptSpec
from escala.schema import PpoConfig
from escala.storage.checkpoints import latest, open_checkpoints
from escala.tracking.spool import read_events
from escala.tracking.tracker import open_tracker
from tests.numerics.local_service import LocalService
from workloads import ppo
from workloads.alignment.learner import policy_weights
from workloads.alignment.ppo_step import PpoStep
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.tokenizer import train_tokenizer
from workloads.model.transformer import Transformer
from workloads.training.entry import WorkerInputs
from workloads.training.loop import RunLoop
from workloads.training.zero import adam_step

PROMPTS = ["def a", "for x in", "class", "import", "return", "self.", "if not", "else:", "try", "with", "as"]


def config(directory: Path, **changes: Any) -> PpoConfig:
    base: dict[str, Any] = {
        "model": {"vocab_size": 300, "n_layers": 1, "d_model": 16, "n_heads": 2, "max_context_tokens": 32},
        "tokenizer": str(directory / "tokenizer.json"),
        "prompts": str(directory / "prompts.jsonl"),
        "rewards": [{"kind": "function", "function": "tests.reward_functions:share_of_e"}],
        "sampling": {"max_response_tokens": 6},
        "batch": {"prompts": 4, "responses_per_prompt": 2, "epochs": 2, "micro_batch_tokens": 64},
        "critic": {"learning_rate": 1e-2},
        "kl": {
            "limit_nats_per_token": 50,
            "coefficient": 0.1,
            "controller": "threshold",
            "target_nats": 0.01,
        },
        "shaping": {"normalise": True, "clip": 3, "missing_eos_penalty": 0.1, "length_penalty": 0.1},
        "training": {
            "steps": 4,
            "zero_stage": 0,
            "checkpoint_every_steps": 0,
            "matmul_precision": "highest",
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        },
    }
    for key, value in changes.items():
        base[key] = (
            {**base[key], **value} if isinstance(base.get(key), dict) and isinstance(value, dict) else value
        )
    return PpoConfig(**base)


class Job:
    """A job's directory, and attempts of it."""

    def __init__(self, directory: Path, section: PpoConfig) -> None:
        self.directory, self.config, self.attempts = directory, section, 0
        self.told: list[int] = []  # iterations whose reward was in the spool when the last attempt was over
        for name in ("checkpoints", "data"):
            (directory / name).mkdir(parents=True)

    def attempt(self, stop_after: int | None = None) -> RunLoop[PpoConfig]:
        """One attempt to its end, from the newest checkpoint; `stop_after` iterations the user stops it."""
        self.attempts += 1
        files = AttemptFiles(self.directory / str(self.attempts))
        files.directory.mkdir()
        spec = AttemptSpec(
            "job", self.attempts, "t", "ppo", "workloads.ppo", self.config.model_dump(mode="json"),
            str(files.directory), str(self.directory / "checkpoints"), str(self.directory / "data"),
            f"spool:{files.spool}", "tests",
        )  # fmt: skip
        prepared = ppo.prepare(spec, self.config)
        found, _ = latest(open_checkpoints(self.directory / "checkpoints"))
        run = open_tracker(spec.tracking_uri).start("key", "tests", "t", {}, {})
        tokenizer = load_chat_tokenizer(Path(self.config.tokenizer or ""))
        service = LocalService(Transformer(self.config.model), tokenizer)
        source = found.address if found else None
        inputs: WorkerInputs[PpoConfig] = WorkerInputs(
            spec, prepared.path, source, run, prepared.fingerprints
        )
        loop = RunLoop(inputs, lambda given: PpoStep(given, service))
        if stop_after is not None:
            loop.watch.poll = lambda *_: "user" if loop.count.step == stop_after else None  # type: ignore[method-assign]
        try:
            loop.run()
        finally:
            points = [p for e in read_events(files.spool) if e["event"] == "metrics" for p in e["points"]]
            self.told = [step for name, _, step, _ in points if name == "reward"]
            loop.close()
        return loop


def facts(loop: RunLoop[PpoConfig]) -> dict[str, Any]:
    step: Any = loop.step
    critic = policy_weights(step.critic) if step.critic is not None else {}
    return {
        "measures": step.measures,
        "kl_coef": step.kl_coef,
        "scores": vars(step.shaping.moments),
        "actor": {name: tensor.double().sum().item() for name, tensor in policy_weights(step.engine).items()},
        "critic": {name: tensor.double().sum().item() for name, tensor in critic.items()},
        "tokens": loop.count.train_tokens,
        "versions": [asked[2] for asked in step.service.asked],
        "seeds": [[p.seed for p in asked[1]] for asked in step.service.asked],
        "samples": step.samples,
    }


def resumed(directory: Path) -> dict[str, Any]:
    """Straight through; and stopped after two iterations, then to the end."""
    straight = Job(directory / "straight", config(directory)).attempt()
    job = Job(directory / "stopped", config(directory))
    job.attempt(stop_after=2)
    told = job.told
    return {"straight": facts(straight), "told": told, "resumed": facts(job.attempt())}


def failing(directory: Path) -> dict[str, Any]:
    """A reward that fails once: named, with a checkpoint of before, and the same end as if it had not."""
    reward = {"kind": "function", "function": "tests.reward_functions:broken_at_third"}
    job = Job(directory / "failing", config(directory, rewards=[reward]))
    message = error_of(lambda: job.attempt())
    saved, _ = latest(open_checkpoints(job.directory / "checkpoints"))
    return {"message": message, "step": saved.step if saved else None, "after": facts(job.attempt())}


def error_of(work: Any) -> str:
    try:
        work()
    except EscalaError as error:
        return f"{type(error).__name__}: {error.message}"
    return "none"


def scenario(directory: Path) -> dict[str, Any]:
    train_tokenizer([inspect.getsource(argparse)], 300).save(str(directory / "tokenizer.json"))
    lines = (json.dumps({"prompt": text}) + "\n" for text in PROMPTS)
    (directory / "prompts.jsonl").write_text("".join(lines))

    def run(name: str, **changes: Any) -> dict[str, Any]:
        return facts(Job(directory / name, config(directory, **changes)).attempt())

    grpo = {"advantage": {"kind": "grpo"}, "critic": None}
    off = {"mode": "one_step_off", "policy_loss": {"importance_cap": 2.0}}
    stop = {"early_stop_multiple": 1e-6, "target_nats": 1e-6}
    frozen = Job(
        directory / "frozen", config(directory, critic={"learning_rate": 1e-2, "warmup_iterations": 2})
    )
    before = facts(frozen.attempt(stop_after=0))
    wild = {"steps": 4, "zero_stage": 0, "optimizer": {"learning_rate": 1e30, "clip_norm": None}}
    in_loss = {"place": "loss", "estimator": "k2", "controller": "proportional", "horizon_episodes": 100}
    stopped_early = Job(directory / "early", config(directory, kl=stop)).attempt(stop_after=1)
    return {
        "resume": resumed(directory),
        "failing": failing(directory),
        "one_step_off": run("off", **off, shaping={"normalise": False}),
        "frozen": [
            before,
            facts(frozen.attempt(stop_after=2)),
            facts(frozen.attempt()),
        ],
        "exploded": error_of(lambda: run("exploded", kl={"limit_nats_per_token": 1e-6})),
        "diverged": error_of(lambda: run("diverged", training=wild)),
        "early_steps": adam_step(stopped_early.step.engine),
        "grpo": run("grpo", **grpo),
        "reinforce": run("reinforce", advantage={"kind": "reinforce_plus_plus"}, critic=None),
        "loss": run("loss", kl=in_loss),
        "events": list(read_events(directory / "straight" / "1" / "tracking")),
    }
