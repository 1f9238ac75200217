"""Between two steps: the fence, a request to stop, the budget. And what each failure is called."""

from pathlib import Path

import pytest
import ray.exceptions

from escala.contract.attempt import Watch
from escala.contract.errors import DataError, Diverged
from escala.contract.records import AttemptFiles, AttemptSpec, Control, write_json
from workloads.training.failures import classify


def watch(directory: Path, **budget: float) -> Watch:
    (directory / "attempt-1").mkdir(exist_ok=True)
    spec = AttemptSpec(
        "j1",
        1,
        "n",
        "pretrain",
        "workloads.pretrain",
        {},
        str(directory / "attempt-1"),
        "",
        "",
        "spool:x",
        "e",
        **budget,
    )
    return Watch(spec)


def test_without_a_reason_it_goes_on(tmp_path: Path) -> None:
    assert watch(tmp_path).poll(spent_flops=1e30, next_flops=1e30) is None


def test_the_last_step_within_the_budget_is_made_and_no_further_one(tmp_path: Path) -> None:
    eye = watch(tmp_path, remaining_flops=10.0)
    assert eye.poll(spent_flops=8.0, next_flops=2.0) is None
    assert eye.poll(spent_flops=9.0, next_flops=2.0) == "budget"


def test_a_spent_time_budget_stops(tmp_path: Path) -> None:
    assert watch(tmp_path, remaining_seconds=0.0).poll(0.0, 1.0) == "budget"
    assert watch(tmp_path, remaining_seconds=1e6).poll(0.0, 1.0) is None


def test_the_fence_goes_before_everything_else(tmp_path: Path) -> None:
    eye = watch(tmp_path, remaining_flops=0.0)
    files = AttemptFiles(tmp_path / "attempt-1")
    write_json(files.control, Control("user"))
    assert eye.poll(0.0, 1.0) == "user"
    write_json(files.current, 2)
    assert eye.poll(0.0, 1.0) == "superseded"


def wrapped(inner: BaseException) -> RuntimeError:
    outer = RuntimeError("Ray says that something failed")
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("no text"), "user_error"),
        (wrapped(Diverged("nan at step 7")), "diverged"),
        (wrapped(MemoryError()), "out_of_memory"),
        (wrapped(RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 GB")), "out_of_memory"),
        (wrapped(ray.exceptions.WorkerCrashedError()), "worker_lost"),
        (wrapped(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")), "worker_lost"),
        (wrapped(ray.exceptions.RaySystemError("the GCS is gone")), "worker_lost"),
        (wrapped(KeyError("a slip of ours")), "internal"),
    ],
)
def test_the_most_telling_cause_names_the_failure(error: BaseException, kind: str) -> None:
    assert classify(error, None).kind == kind


def test_our_own_error_keeps_its_words_and_exit_code() -> None:
    failure = classify(wrapped(DataError("no text", "give some")), None)
    assert (failure.message, failure.hint, failure.exit_code) == ("no text", "give some", DataError.exit_code)


def test_the_reason_of_a_failure_is_whole() -> None:
    """Ray's errors name the cause at their end."""
    said = "The actor died unexpectedly. " + "frame " * 1000 + "killed by SIGKILL"
    assert classify(ray.exceptions.RaySystemError(said), None).message.endswith("killed by SIGKILL")
