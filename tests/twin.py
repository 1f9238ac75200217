"""The pretraining run that nobody disturbs, and its twins, which are: two workers under ZeRO-3 on real text."""

from __future__ import annotations

import email
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from escala import Escala
from escala.settings import Settings
from tests.conftest import wait_for

STEPS, EVERY, BATCH, CONTEXT = 120, 10, 4, 64  # time for four kills, each right after a checkpoint
MODEL = f"model={{vocab_size: 512, n_layers: 2, d_model: 64, n_heads: 2, max_context_tokens: {CONTEXT}}}"
# Text that every installation has: the standard library's email package, 20 files.
CORPUS = f"{{kind: files, root: {Path(email.__file__).parent}, globs: ['*.py']}}"
DATA = f"data={{corpora: [{CORPUS}], tokenizer: {{vocab_size: 512}}, held_out_fraction: 0.1}}"
TRAINING = {
    "steps": STEPS,
    "batch_sequences": BATCH,
    "zero_stage": 3,
    "zero_param_persistence_threshold": 0,
    "checkpoint_every_steps": EVERY,
    "evaluation_tokens": 1024,
}


def submit(name: str, *more: str, **options: Any) -> str:
    """The id of a job that trains as the twin does, but for `more`."""
    training = [f"training.{key}={value}" for key, value in TRAINING.items()]
    overrides = [MODEL, DATA, *training, "resources.workers=2", *more]
    return Escala().submit("pretrain", (), overrides, {"name": name, **options}).id


def delivered_losses(job_id: str) -> dict[int, float]:
    """Step -> training loss, of all runs of a job together once all is at the tracker: a run for each attempt, no step
    twice in one, and those that a later one made again as they were.
    """
    wait_for(
        lambda: all(a.delivered for a in Escala().job(job_id).attempts), 120, "its runs in MLflow", every=0.5
    )
    runs = Escala().runs(job=job_id)
    assert sorted(run.attempt for run in runs) == [a.number for a in Escala().job(job_id).attempts]
    client, losses = MlflowClient(Settings().tracker), {}
    for run in runs:
        points = client.get_metric_history(run.run_id, "train_loss_nats")
        found = {point.step: point.value for point in points}
        assert len(found) == len(points), "a step is doubled"
        assert all(losses.get(step, loss) == loss for step, loss in found.items())
        losses |= found
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses
