"""PPO on the session's cluster, through `api.submit`: it learns a task whose optimum is known while policy replicas are
killed; its checkpoint goes on.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from escala import api
from escala.manifests import list_checkpoints
from escala.records import JobFiles, Progress, read_record
from escala.settings import Settings
from tests.conftest import wait_for
from workloads.data.tokenizer import train_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]

ITERATIONS = 24
PROMPTS = ["def a", "for x in", "class", "import", "return", "self.", "if not", "else:"]


def share_of_e(prompts: list[str], responses: list[str]) -> list[float]:
    """1 where nothing but the letter e is said, which is the optimum."""
    return [text.count("e") / max(1, len(text)) for text in responses]


def config(directory: Path) -> dict[str, Any]:
    tokenizer, prompts = directory / "tokenizer.json", directory / "prompts.jsonl"
    train_tokenizer([inspect.getsource(argparse)], 300).save(str(tokenizer))
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return {
        "model": {"vocab_size": 300, "n_layers": 2, "d_model": 32, "n_heads": 2, "max_context_tokens": 32},
        "tokenizer": str(tokenizer),
        "prompts": str(prompts),
        "rewards": [{"kind": "function", "function": "tests.integration.test_ppo:share_of_e"}],
        "sampling": {"max_response_tokens": 8},
        "rollouts": {"replica_cpus": 0.5},
        "batch": {
            "prompts": 8,
            "responses_per_prompt": 8,
            "epochs": 2,
            "minibatches": 4,
            "micro_batch_tokens": 512,
        },
        "advantage": {"kind": "rloo"},
        "kl": {"coefficient": 0.0, "limit_nats_per_token": 20},
        "training": {
            "steps": ITERATIONS,
            "zero_stage": 3,
            "zero_param_persistence_threshold": 0,
            "optimizer": {"learning_rate": 1e-2},
            "checkpoint_every_steps": 8,
        },
        "resources": {"workers": 2, "cpus_per_worker": 0.5},
    }


def replicas(job_id: str) -> dict[str, Any]:
    found = api.rollouts_status(f"ppo-{job_id}")
    return {
        r.id: r for d in found.deployments if d.name == "policy" for r in d.replicas if r.state == "RUNNING"
    }


def test_it_learns_a_known_optimum_and_survives_a_killed_policy_replica(
    cluster: Path, tmp_path: Path
) -> None:
    job = api.submit("ppo", base=config(tmp_path), options={"name": "ppo", "retries": 0}).id

    files = JobFiles(Settings().home, job)

    def step() -> int:
        found = api.job(job).job
        assert found.state not in api.FINAL, "".join(api.logs(job))[-3000:]
        progress = read_record(Progress, files.attempt(1).progress)
        return 0 if progress is None else progress.step

    wait_for(lambda: step() >= 3, 240, "three iterations", every=0.2)
    (victim,) = replicas(job).values()
    os.kill(victim.pid, signal.SIGKILL)
    wait_for(lambda: api.job(job).job.state in api.FINAL, 300, "the end", every=0.5)
    ended = api.job(job)
    assert ended.job.state == "succeeded", "".join(api.logs(job))[-3000:]
    record = wait_for(lambda: api.runs(job=job), 60, "the run", every=1.0)[0]
    assert record.measures["reward"] > 0.9
    assert record.held_out_loss_nats is None
    assert record.measures["engine_gap_nats"] < 1e-4
    assert api.rollouts_status(f"ppo-{job}").status == "ABSENT"
    assert [c.step for c in list_checkpoints(files.checkpoints)] == [16, 24]
