"""The run loop with a step that trains nothing: what it counts, saves, evaluates and tells, and when it stops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from escala.contract.attempt import request_stop
from escala.contract.checkpoints import checkpoint_name
from escala.contract.errors import CheckpointError, StateError, Superseded
from escala.contract.records import AttemptFiles, AttemptSpec, Progress, load_record
from escala.schema import PretrainConfig
from escala.storage.base import CheckpointStore
from escala.storage.checkpoints import Checkpoint, open_checkpoints
from workloads.training import checkpoint, loop, status
from workloads.training.agreement import AgreedError, from_first_rank, on_all_ranks
from workloads.training.entry import WorkerInputs
from workloads.training.loop import RunLoop
from workloads.training.step import Counters, StepResult
from workloads.training.task import Evaluation

TOKENS, FLOPS_PER_TOKEN = 10, 7.0


class CountingStep:
    """A step whose only state is how often it ran. `fails_at`: an error that the ranks agree on, before that step."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.engine: Any = SimpleNamespace(own_experts=None, module=torch.nn.Linear(2, 2))
        self.fails_at, self.calls, self.closed = fails_at, list[str](), False

    def build(self) -> None:
        self.calls.append("build")

    def other_engines(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"counting": {"runs": self.calls.count("run")}}

    def restore(self, found: Checkpoint) -> None:
        self.calls.append(f"restore {found.part('counting.runs', int)}")

    def begin(self, step: int) -> int:
        return TOKENS

    def run(self, count: Counters) -> StepResult:
        if count.step == self.fails_at:
            raise AgreedError(StateError("the service is gone"))
        self.calls.append("run")
        return StepResult(TOKENS, FLOPS_PER_TOKEN, loss_nats=5.0 - count.step)

    def report(self, step: int, is_logged: bool, reporter: Any) -> None:
        self.calls.append(f"report {step}{'' if is_logged else ' unlogged'}")

    def evaluate(self) -> Evaluation:
        self.calls.append("evaluate")
        return Evaluation({"held_out_loss_nats": 6.0})

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as the only rank of a machine that needs no measuring."""
    monkeypatch.setattr(status, "measure_peak", lambda training, device: 1e9)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.distributed.destroy_process_group()


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The manifests of what was saved; nothing is written."""
    manifests: list[dict[str, Any]] = []

    def save(engine: Any, store: CheckpointStore, step: int, manifest: dict[str, Any], *_: Any) -> Checkpoint:
        manifests.append({"step": step, **manifest})
        return Checkpoint(store, checkpoint_name(step), step, manifest)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(checkpoint, "load", lambda *_: None)
    return manifests


def inputs(tmp_path: Path, source: str | None = None, **training: Any) -> WorkerInputs[PretrainConfig]:
    values = {"training": {"steps": 4, "checkpoint_every_steps": 0, **training}}
    files = AttemptFiles(tmp_path / "1")
    files.directory.mkdir(exist_ok=True)
    spec = AttemptSpec(
        "job", 1, "t", "pretrain", "workloads.pretrain", values, str(files.directory),
        str(tmp_path / "checkpoints"), str(tmp_path / "data"), f"spool:{files.spool}", "tests",
    )  # fmt: skip
    return WorkerInputs(spec, "", source, "run", {"tokenizer": "t"})


def facts(tmp_path: Path) -> Any:
    return json.loads(AttemptFiles(tmp_path / "1").facts.read_text())


def test_a_run_counts_evaluates_and_saves(tmp_path: Path, saved: list[dict[str, Any]]) -> None:
    step, told = CountingStep(), list[int]()
    given = inputs(tmp_path, checkpoint_every_steps=3, evaluate_every_steps=2, log_every_steps=2)
    this = RunLoop(given, lambda _: step, lambda number, _: told.append(number))
    this.run()
    this.close()
    assert told == [0, 2, 4]
    assert [one["step"] for one in saved] == [3, 4]
    assert saved[0]["counters"] == {
        "train_tokens": 30, "compute_flops": 210.0, "initial": {"held_out_loss_nats": 6.0}, "last_loss": 3.0,
    }  # fmt: skip
    assert saved[0]["counting"] == {"runs": 3}
    assert [call for call in step.calls if call.startswith("report")] == [
        "report 1 unlogged", "report 2", "report 3 unlogged", "report 4",
    ]  # fmt: skip
    found = facts(tmp_path)
    assert (found["outcome"], found["train_tokens"], found["attempt_flops"]) == ("succeeded", 40, 280.0)
    assert found["held_out_loss_nats"] == found["initial_held_out_loss_nats"] == 6.0
    assert step.closed


def test_what_a_checkpoint_holds_is_counted_before_it_is_there(
    tmp_path: Path, saved: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after it, the worker has spent that much of its budget, and nobody makes the steps again."""
    save, counted = checkpoint.save, list[int]()

    def look(*args: Any) -> Checkpoint:
        counted.append(load_record(Progress, AttemptFiles(tmp_path / "1").progress).train_tokens)
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", look)
    RunLoop(inputs(tmp_path, checkpoint_every_steps=2), lambda _: CountingStep()).run()
    assert counted == [20, 40]


def test_a_resumed_run_goes_on_from_its_counters(
    tmp_path: Path, saved: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = {
        "train_tokens": 20,
        "compute_flops": 140.0,
        "initial": {"held_out_loss_nats": 8.0},
        "last_loss": 4.0,
    }
    stored = Checkpoint(
        open_checkpoints(tmp_path), checkpoint_name(2), 2, {"counters": counters, "counting": {"runs": 2}}
    )
    monkeypatch.setattr(loop, "checkpoint_at", lambda path: stored)
    step = CountingStep()
    this = RunLoop(inputs(tmp_path, source=stored.address), lambda _: step)
    this.run()
    assert step.calls == ["build", "restore 2", "run", "report 3", "run", "report 4", "evaluate"]
    assert (this.count.train_tokens, this.count.attempt_tokens) == (40, 20)
    assert facts(tmp_path)["initial_held_out_loss_nats"] == 8.0


@pytest.mark.parametrize("reason", ["user", "preempted", "budget"])
def test_a_run_that_is_to_stop_saves_first(tmp_path: Path, saved: list[dict[str, Any]], reason: str) -> None:
    step = CountingStep()
    this = RunLoop(inputs(tmp_path), lambda _: step)
    this.watch.poll = lambda spent, following: reason if spent >= 140 else None  # type: ignore[method-assign]
    this.run()
    assert [one["step"] for one in saved] == [2]
    assert facts(tmp_path)["outcome"] == reason
    assert step.calls.count("evaluate") == (2 if reason == "budget" else 1)


def test_a_lost_attempt_writes_nothing_more(tmp_path: Path, saved: list[dict[str, Any]]) -> None:
    this = RunLoop(inputs(tmp_path), lambda _: CountingStep())
    this.watch.poll = lambda spent, following: "superseded"  # type: ignore[method-assign]
    with pytest.raises(Superseded):
        this.run()
    assert saved == []


def test_an_error_that_ranks_agree_on_is_raised_after_a_checkpoint(
    tmp_path: Path, saved: list[dict[str, Any]]
) -> None:
    this = RunLoop(inputs(tmp_path), lambda _: CountingStep(fails_at=3))
    with pytest.raises(StateError, match="the service is gone"):
        this.run()
    assert [one["step"] for one in saved] == [3]


def test_an_error_before_the_first_step_saves_nothing(tmp_path: Path, saved: list[dict[str, Any]]) -> None:
    this = RunLoop(inputs(tmp_path), lambda _: CountingStep(fails_at=0))
    with pytest.raises(StateError):
        this.run()
    assert saved == []


def test_a_full_disk_is_waited_for_until_somebody_stops_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = RunLoop(inputs(tmp_path, checkpoint_every_steps=4), lambda _: CountingStep())
    waits: list[float] = []

    def full(*_: Any) -> Checkpoint:
        raise CheckpointError("checkpoint cannot be written: OSError: [Errno 28] No space left on device")

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            request_stop(AttemptFiles(tmp_path / "1"), "user")

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(loop.time, "sleep", sleep)
    with pytest.raises(CheckpointError, match="No space left"):
        this.run()
    assert waits == [loop.FULL_SECONDS] * 2


def test_ranks_agree_on_results_and_errors() -> None:
    assert on_all_ranks(lambda: 3) == 3
    assert from_first_rank(2, torch.device("cpu")) == 2

    def fail() -> int:
        raise CheckpointError("no")

    with pytest.raises(AgreedError) as caught:
        on_all_ranks(fail)
    assert caught.value.error.message == "no"
