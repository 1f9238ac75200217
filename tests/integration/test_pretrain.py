"""Real pretraining attempts: Ray Train, two workers, ZeRO-3, real text, driven as the control plane drives
them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from escala.planning.cost import communication
from escala.schema import PretrainConfig
from escala.storage.checkpoints import list_checkpoints, open_checkpoints

_spec = importlib.util.spec_from_file_location("attempts", Path(__file__).with_name("attempts.py"))
assert _spec is not None
assert _spec.loader is not None
attempts = sys.modules["attempts"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attempts)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 40


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with attempts.ray_head() as environment:
        yield environment


def config(text: Path, **training: Any) -> dict[str, Any]:
    return {
        "model": {"vocab_size": 512, "n_layers": 2, "d_model": 64, "n_heads": 2, "max_context_tokens": 64},
        "data": {
            "corpora": [{"kind": "files", "root": str(text), "globs": ["*.py"]}],
            "tokenizer": {"vocab_size": 512},
            "held_out_fraction": 0.1,
        },
        "training": {
            "steps": STEPS,
            "batch_sequences": 4,
            "zero_stage": 3,
            "zero_param_persistence_threshold": 0,
            "checkpoint_every_steps": 10,
            "evaluation_tokens": 1024,
            **training,
        },
        "resources": {"workers": 2},
    }


@pytest.fixture(scope="module")
def text() -> Path:
    """Real text that every installation has: the standard library's email package, 30 files."""
    import email

    return Path(email.__file__).parent


@pytest.fixture(scope="module")
def undisturbed(environment: dict[str, str], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    job = attempts.Job(tmp_path_factory.mktemp("job"), environment, config(text))
    outcome = job.run(1)
    assert outcome.kind == "succeeded", job.files(1).log.read_text()[-5000:]
    return job, outcome


def test_two_workers_train_and_record(undisturbed: Any) -> None:
    job, outcome = undisturbed
    record = outcome.record
    assert record["held_out_loss_nats"] < record["initial_held_out_loss_nats"] - 0.5
    assert record["train_tokens"] == record["attempt_tokens"] == STEPS * 4 * 64
    assert record["compute_flops"] > 0
    assert record["workers"] == 2
    assert record["communication_bytes"] == pytest.approx(
        communication(PretrainConfig.model_validate(job.config)).sent_bytes, rel=0.05
    )
    assert record["peak_memory_bytes"] > record["idle_memory_bytes"] > 0
    assert (
        record["energy_joules"] is None
    )  # this attempt was told of no cluster's coefficients, and has no counter
    assert 0 < record["model_flops_utilization"] < 1
    for name in ("corpus", "tokenizer", "evaluation", "config", "code"):
        assert len(record[f"{name}_fingerprint"]) == 64
    assert [c.step for c in list_checkpoints(open_checkpoints(job.root / "checkpoints"))] == [30, 40]
    assert outcome.checkpoint.endswith("step-00000040")


def test_each_rank_holds_half_of_the_parameters(undisturbed: Any) -> None:
    job, outcome = undisturbed
    held, total = job.facts(1)["parameters_held"], outcome.record["n_total"]
    assert len(held) == 2
    assert all(total / 2 <= share <= total / 2 + 50 for share in held)  # a padded element a parameter


def test_preempted_and_resumed_ends_as_if_undisturbed(
    undisturbed: Any, environment: dict[str, str], text: Path, tmp_path: Path
) -> None:
    _, whole = undisturbed
    job = attempts.Job(tmp_path, environment, config(text))
    process = job.start(1)
    job.wait_for_step(1, 1, process)
    process.terminate()
    first = job.end(1, process)
    assert first.kind == "preempted"
    assert first.checkpoint is not None
    assert process.returncode == 0
    second = job.run(2)
    assert second.kind == "succeeded"
    for key in ("train_loss_nats", "held_out_loss_nats", "initial_held_out_loss_nats", "train_tokens"):
        assert second.record[key] == whole.record[key], key  # bitwise
    assert second.record["attempt_tokens"] == whole.record["train_tokens"] - first.record["attempt_tokens"]


def test_divergence_is_named_and_not_checkpointed(
    environment: dict[str, str], text: Path, tmp_path: Path
) -> None:
    wild = config(text, optimizer={"learning_rate": 1e30, "clip_norm": None}, zero_stage=0)
    job = attempts.Job(tmp_path, environment, wild | {"resources": {"workers": 1}})
    outcome = job.run(1)
    assert outcome.kind == "diverged"
    assert "diverged at step" in outcome.message
    assert not list_checkpoints(open_checkpoints(job.root / "checkpoints"))
