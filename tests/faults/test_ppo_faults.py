"""PPO on the session's cluster: it learns a task whose optimum is known, as a sweep's trial and as a job; and the same
again while a replica of each kind, a learner and the driver are killed, with the same numbers to the last bit.
"""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from escala import Escala
from escala.contract.records import JobFiles, TrialFiles
from escala.documents import dump
from escala.managed import ray_directory
from escala.schema import ModelConfig
from escala.settings import Settings
from escala.storage.checkpoints import list_checkpoints, open_checkpoints
from escala.sweeps.trials import read_planned
from escala.tracking.mlflow_tracker import open_client
from escala.tracking.spool import read_events
from escala.views.run_records import RunView
from tests.conftest import wait_for
from tests.faults.victims import at_step, driver, ended, files, titled
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.tokenizer import train_tokenizer
from workloads.model.transformer import Transformer
from workloads.rewards.reward_model import RewardModel, save_reward_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ITERATIONS, EVERY = 24, 6
MODEL = {"vocab_size": 300, "n_layers": 2, "d_model": 32, "n_heads": 2, "max_context_tokens": 32}
PROMPTS = ["def a", "for x in", "class", "import", "return", "self.", "if not", "else:"]
GAPS = ("engine_gap_nats", "engine_gap_max_nats")  # rounding, which depends on which requests meet in a batch


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("ppo")
    tokenizer, prompts, rated = (directory / name for name in ("tokenizer.json", "prompts.jsonl", "reward"))
    train_tokenizer([inspect.getsource(argparse)], MODEL["vocab_size"]).save(str(tokenizer))
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    torch.manual_seed(1)
    rated.mkdir()
    save_reward_model(RewardModel(Transformer(ModelConfig(**MODEL))), load_chat_tokenizer(directory), rated)
    return {
        "model": MODEL,
        "tokenizer": str(tokenizer),
        "prompts": str(prompts),
        "rewards": [
            {"kind": "function", "function": "tests.reward_functions:share_of_e"},
            {"kind": "model", "model": str(rated), "weight": 0.05},
        ],
        "sampling": {"max_response_tokens": 8},
        "rollouts": {
            "replica_cpus": 0.5,
            "max_running": 8,  # eight waves: time to be killed in
            "kernels": "fp32=plain/plain",
        },
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
            "checkpoint_every_steps": EVERY,
        },
        "resources": {"workers": 2, "cpus_per_worker": 0.5},
    }


@dataclass(frozen=True)
class Found:
    """What a job has left, its attempts put together."""

    metrics: dict[str, dict[int, float]]  # by name and iteration
    samples: dict[int, list[Any]]  # rows of the iteration's table
    weights: dict[str, Any]  # of the last checkpoint: its files' digests
    state: dict[str, Any]  # of the last checkpoint: counters, prompt position, moments


def found(job_id: str) -> Found:
    wait_for(
        lambda: all(a.delivered for a in Escala().job(job_id).attempts), 120, "its runs in MLflow", every=0.5
    )
    metrics: dict[str, dict[int, float]] = {}
    samples: dict[int, list[Any]] = {}
    for run in sorted(Escala().runs(job=job_id), key=lambda run: run.attempt):
        for name, points in histories(run.run_id).items():
            add(metrics.setdefault(name, {}), points)
        add(samples, table(job_id, run.attempt))
    last = list_checkpoints(open_checkpoints(JobFiles(Settings().home, job_id).checkpoints))[-1]
    assert last.step == ITERATIONS
    manifest = last.manifest
    state = {key: manifest[key] for key in ("counters", "data", "ppo", "adam_step")}
    for gap in GAPS:
        del state["ppo"]["measures"][gap]
    return Found(metrics, samples, manifest["files"], state)


def add(whole: dict[int, Any], attempt: dict[int, Any]) -> None:
    """An attempt's iterations; those that an earlier one has made too had the same numbers then."""
    again = whole.keys() & attempt.keys()
    assert {step: whole[step] for step in again} == {step: attempt[step] for step in again}
    whole |= attempt


def histories(run_id: str) -> dict[str, dict[int, float]]:
    """A run's metrics but those of the clock, each iteration once."""
    client = open_client(Settings().tracker)
    result = {}
    for name in client.get_run(run_id).data.metrics:
        points = client.get_metric_history(run_id, name)
        steps = [point.step for point in points]
        assert len(set(steps)) == len(steps), f"{name} is doubled: {steps}"
        if not name.endswith(("per_second", "utilization")):
            result[name] = {point.step: point.value for point in points}
    return result


def table(job_id: str, attempt: int) -> dict[int, list[Any]]:
    """The last table of samples that an attempt has written: iteration -> rows."""
    events = read_events(files(job_id, attempt).spool)
    texts = [event["content"] for event in events if event.get("path") == "samples.json"]
    rows: dict[int, list[Any]] = {}
    for iteration, *row in json.loads(texts[-1])["data"]:
        rows.setdefault(iteration, []).append(row)
    return rows


def application(job_id: str) -> str:
    return f"ppo-{job_id}"


def replica(job_id: str, deployment: str) -> psutil.Process:
    """The one running replica's process."""

    def one() -> list[int]:
        (there,) = (
            d for d in Escala().rollouts_status(application(job_id)).deployments if d.name == deployment
        )
        return [r.pid for r in there.replicas if r.state == "RUNNING" and psutil.pid_exists(r.pid)]

    (pid,) = wait_for(one, 60, f"a {deployment} replica of {job_id}")
    return psutil.Process(pid)


def kill_in_a_rollout(job_id: str) -> None:
    """Kill the policy replica while it owes responses; the ingress's log tells whether it did."""
    from workloads.serving.client import Rollouts

    service = Rollouts(application(job_id))

    def hit() -> bool:
        victim = replica(job_id, "policy")
        wait_for(lambda: service.describe()["started"], 60, "responses on their way", every=0.001)
        victim.kill()
        wait_for(lambda: replica(job_id, "policy").pid != victim.pid, 60, "another replica")
        return asked_again(job_id)

    wait_for(hit, 120, "a replica killed in a rollout")


def asked_again(job_id: str) -> bool:
    logs = ray_directory(Settings()) / "session_latest" / "logs" / "serve"
    lines = (log.read_text() for log in logs.glob(f"replica_{application(job_id)}_api_*.log"))
    return any("another one is asked" in text for text in lines)


def gone(job_id: str) -> bool:
    """Its application, and Serve, which has no other one."""
    return Escala().rollouts_status(application(job_id)).status == "ABSENT" and not titled("ServeController")


def saved(checkpoints: Path) -> list[int]:
    """The checkpoints' steps."""
    return [c.step for c in list_checkpoints(open_checkpoints(checkpoints))]


def learned_it(record: RunView) -> None:
    assert record.measures["reward"] > 0.9
    assert record.held_out_loss_nats is None
    assert record.measures[GAPS[0]] < 1e-4


def test_a_sweeps_trial_learns_a_known_optimum(cluster: Path, config: dict[str, Any], tmp_path: Path) -> None:
    """One rank in the trial's own process, beside a service of its own: no start of Ray Train."""
    shorter = {
        "sampling": {"max_response_tokens": 4},
        "rollouts": {"replica_cpus": 0.5, "max_running": 32},
        "batch": {**config["batch"], "epochs": 4},
        "training": {**config["training"], "zero_stage": 0},
        "resources": {"workers": 1, "cpus_per_worker": 0.5},
    }
    space = tmp_path / "ppo.yaml"
    vary = {"training.steps": [ITERATIONS]}
    space.write_text(dump({"workload": "ppo", "aim": "search", "base": config | shorter, "vary": vary}))
    job = ended(Escala().sweep(str(space)).id).job
    (planned,) = read_planned(Settings().home, job.id)
    trial = TrialFiles(Settings().home, planned.fingerprint)
    assert job.state == "succeeded", f"{job.message}: {trial.attempt(1).log.read_text()[-3000:]}"
    Escala().finished_run(job.id)  # all is in the tracker, the trial's run too
    (record,) = Escala().runs(job=job.id, workload="ppo")
    learned_it(record)
    assert saved(trial.checkpoints) == [ITERATIONS - EVERY, ITERATIONS]
    wait_for(lambda: gone(planned.fingerprint), 30, "the end of its service")


@pytest.fixture(scope="module")
def learned(cluster: Path, config: dict[str, Any]) -> str:
    return Escala().submit("ppo", base=config, options={"name": "ppo", "retries": 0}).id


@pytest.mark.nightly(minutes=2)  # two workers, and the twin of the one that is killed
def test_it_learns_a_known_optimum(learned: str) -> None:
    details = ended(learned)
    assert details.job.state == "succeeded", "".join(Escala().logs(learned))[-3000:]
    learned_it(Escala().finished_run(learned))
    assert [line for line in Escala().logs(learned) if " -- CALL " in line] == []  # Serve's, one per response
    assert saved(JobFiles(Settings().home, learned).checkpoints) == [ITERATIONS - EVERY, ITERATIONS]
    wait_for(lambda: gone(learned), 30, "the end of its service")


@pytest.mark.nightly(minutes=4)  # five starts
def test_killed_in_every_part_it_ends_with_the_same_numbers(
    learned: str, connected: None, config: dict[str, Any]
) -> None:
    ended(learned)
    job = Escala().submit("ppo", base=config, options={"name": "ppo-killed", "retries": 1}).id
    at_step(job, 1)
    kill_in_a_rollout(job)
    at_step(job, 3)
    replica(job, "reward").kill()
    at_step(job, EVERY + 1)
    titled("RayTrainWorker")[0].kill()
    at_step(job, 2 * EVERY + 1, attempt=2)
    replicas = [replica(job, name) for name in ("api", "policy", "reward")]
    driver(job).kill()

    # Nobody is left to take its service down: it goes by itself.
    wait_for(lambda: gone(job), 30, "the end of a dead driver's service")
    assert psutil.wait_procs(replicas, timeout=5)[1] == []
    details = ended(job)
    assert details.job.state == "failed"
    assert [a.outcome for a in details.attempts] == ["worker_lost", "driver_lost"]

    Escala().retry(job)
    details = ended(job)
    assert [a.outcome for a in details.attempts] == ["worker_lost", "driver_lost", "succeeded"]
    assert sum("resumed from" in line for line in Escala().logs(job)) == 2
    wait_for(lambda: gone(job), 30, "the end of its service")
    expected, result = found(learned), found(job)
    assert result.metrics["reward"].keys() == set(range(1, ITERATIONS + 1))
    for gap in GAPS:
        gaps = [one.metrics.pop(gap) for one in (expected, result)]
        assert gaps[1] == pytest.approx(gaps[0], abs=1e-5)
    assert result == expected
