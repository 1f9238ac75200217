"""One trial of a sweep, inside the process that the sweep's driver started for it: a run like any other.

One worker trains here, without the start-up of a Ray Train group (seconds of CPU); more workers are started as
`workloads.pretrain` starts them. The process may train one trial after another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from escala.contract.files import forgiving_log
from escala.contract.records import AttemptSpec, Outcome
from escala.tracking.lineage.lifecycle import LiveAttempt
from workloads.training.driver import fit
from workloads.training.entry import Prepared, WorkerInputs, load_entry
from workloads.training.failures import classify
from workloads.training.run import ending, parse, summary, worker_inputs

if TYPE_CHECKING:
    from workloads.training.task import Evaluation

OnEvaluation = Callable[[int, float], None]  # step, held-out loss in nats per token


def prepare(spec: AttemptSpec) -> Prepared:
    """Make the data of a trial ready, which `run` takes. Raises DataError."""
    return load_entry(spec.entry_point).prepare(spec, parse(spec.workload, spec.config))


def run(spec: AttemptSpec, prepared: Prepared, on_evaluation: OnEvaluation | None = None) -> Outcome:
    """Train one trial; its outcome, which is also in its directory. Whatever goes wrong is in the outcome; where Ray
    Tune ends the trial (SystemExit) there is none.

    `on_evaluation` is called after each evaluation of a one-worker trial.
    """
    attempt = LiveAttempt(spec, partial(classify, nodes=None), summary, whole_process=False)
    with forgiving_log(attempt.files.log) as log, redirect_stdout(log), redirect_stderr(log):
        with attempt:
            _train(attempt, prepared, on_evaluation)
    return attempt.outcome


def _train(attempt: LiveAttempt, prepared: Prepared, on_evaluation: OnEvaluation | None) -> None:
    config = attempt.open(partial(parse, attempt.spec.workload))
    inputs = worker_inputs(attempt, prepared, config)
    with load_entry(attempt.spec.entry_point).sidecar(inputs):
        if config.resources.workers > 1:
            fit(inputs)
        else:
            _train_here(inputs, config.resources.gpus_per_worker > 0, on_evaluation)
    attempt.outcome = ending(attempt)


def _train_here(inputs: WorkerInputs[Any], on_gpu: bool, on_evaluation: OnEvaluation | None) -> None:
    """The training loop in this process, alone in a process group of its own."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    import torch.distributed

    from workloads.training.device import process_group_backend
    from workloads.training.worker import train

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # torch exports it without saying so
        backend = process_group_backend(on_gpu)
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    tell = None if on_evaluation is None else lambda step, found: _tell(on_evaluation, step, found)
    train(inputs, tell)


def _tell(on_evaluation: OnEvaluation, step: int, found: Evaluation) -> None:
    """A trial without a held-out loss is judged by its end."""
    if "held_out_loss_nats" in found.record:
        on_evaluation(step, found.loss_nats)
