"""One attempt of a workload that trains, from its spec to its outcome: the same for every entry point.

The driver prepares data, chooses the checkpoint, starts Ray Train's workers (training/loop.py) and writes the
outcome. It retries nothing: a retry is a new attempt, which the control plane makes from the last checkpoint.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from escala.contract.attempt import stop_on_sigterm
from escala.contract.errors import CheckpointError, SpecError
from escala.contract.files import set_aside
from escala.contract.records import (
    STOP_REASONS,
    AttemptFiles,
    AttemptSpec,
    Outcome,
    Progress,
    RunRecord,
    read_json,
    read_record,
)
from escala.schema import ModelConfig, TrainedConfig
from escala.schema.workloads import get_workload
from escala.storage.base import CheckpointStore
from escala.storage.checkpoints import (
    Checkpoint,
    check_fits,
    list_checkpoints,
    newest,
    open_checkpoints,
    verify,
    verify_tokenizer,
)
from escala.tracking.lineage.datasets import dataset_of
from escala.tracking.lineage.lifecycle import LiveAttempt, RunSummary, run_attempt
from workloads.training.driver import fit
from workloads.training.entry import Prepared, WorkerInputs, load_entry
from workloads.training.failures import NodeWatch, classify

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",  # the tokens that end an answer
)


def main(arguments: list[str]) -> int:
    """Run one attempt; returns the process's exit code (0 for every clean end, else the error's)."""
    return run_attempt(arguments, train, partial(classify, nodes=None), summary)


def train(attempt: LiveAttempt) -> None:
    """Everything up to the end of training. Raises what goes wrong."""
    import ray

    config = attempt.open(partial(parse, attempt.spec.workload))
    entry = load_entry(attempt.spec.entry_point)
    inputs = worker_inputs(attempt, entry.prepare(attempt.spec, config), config)
    ray.init(address="auto", log_to_driver=True, namespace="escala")
    stop_on_sigterm(attempt.files)
    attempt.classify = partial(classify, nodes=NodeWatch())
    with entry.sidecar(inputs):
        fit(inputs)
    attempt.outcome = ending(attempt)


def worker_inputs(attempt: LiveAttempt, prepared: Prepared, config: TrainedConfig) -> WorkerInputs[Any]:
    """What the training loop is given: the data, and the checkpoint to start from, which the attempt's record names."""
    spec = attempt.spec
    attempt.reads(prepared.fingerprints)
    found = choose_checkpoint(spec, config, prepared.fingerprints["tokenizer"])
    for address in filter(None, (spec.checkpoints, spec.trunk)):
        keep_tokenizer(prepared.tokenizer, open_checkpoints(address), found)
    attempt.checkpoint = found.address if found else None
    _, run_id = attempt.run
    return WorkerInputs(spec, prepared.path, attempt.checkpoint, run_id, prepared.fingerprints)


def ending(attempt: LiveAttempt) -> Outcome:
    """Trained to the last step, or stopped for a stated reason with a checkpoint. Raises RuntimeError for neither."""
    kind = _facts(attempt.files).get("outcome", "internal")
    if kind != "succeeded" and kind not in STOP_REASONS:
        raise RuntimeError("the workers ended without saying how")
    return Outcome(kind, STOP_MESSAGES[kind])


def summary(attempt: LiveAttempt) -> RunSummary:
    """What rank 0 left of the run, and the configuration's part of its record."""
    facts = _facts(attempt.files)
    known = {f.name for f in fields(RunRecord)}
    values = spec_numbers(attempt.spec) | {k: v for k, v in facts.items() if k in known}
    progress = read_record(Progress, attempt.files.progress)
    if progress is not None:  # newer than the facts where the attempt was cut off
        values["attempt_tokens"] = max(values.get("attempt_tokens") or 0, progress.train_tokens)
        values["attempt_flops"] = max(values.get("attempt_flops") or 0.0, progress.compute_flops)
        values["wall_seconds"] = max(values.get("wall_seconds") or 0.0, progress.wall_seconds)
    rows = []
    if attempt.fingerprints:
        data = dataset_of(attempt.spec.config, attempt.fingerprints)
        rows = [("data", f"{data.name} (`{data.digest[:12]}`)")]
    held = "parameters_held"
    tags = {f"escala.{held}": json.dumps(facts[held])} if held in facts else {}
    return RunSummary(values, rows, tags, checkpoint=_kept(attempt, facts))


def _kept(attempt: LiveAttempt, facts: dict[str, Any]) -> str | None:
    """The last good checkpoint; none of a trunk, which goes when its branches have ended."""
    address: str | None = facts.get("checkpoint", attempt.checkpoint)
    trunk = attempt.spec.trunk
    return None if address and trunk and Path(address).parent == Path(trunk) else address


def _facts(files: AttemptFiles) -> dict[str, Any]:
    """What rank 0 left (training/report.py); empty where it did not get far enough."""
    try:
        facts: dict[str, Any] = read_json(files.facts)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        set_aside(files.facts, str(error))
        return {}
    return facts


# What the manifest of a checkpoint must say for a run to go on from it.
RESUMABLE = {
    "config.model": dict,
    "fingerprints.tokenizer": str,
    "adam_step": int,
    "counters.train_tokens": int,
    "counters.compute_flops": float,
}

STOP_MESSAGES = {
    "succeeded": "",
    "user": "stopped on request, with a checkpoint",
    "budget": "the job's budget is spent; stopped with a checkpoint",
    "preempted": "preempted; stopped with a checkpoint",
}


def parse(workload: str, plain: dict[str, Any]) -> TrainedConfig:
    """The configuration of a workload that trains. Raises pydantic.ValidationError, SpecError."""
    kind = get_workload(workload)
    return kind.trained(kind.parse(plain))


def spec_numbers(spec: AttemptSpec) -> dict[str, Any]:
    """What the record takes from the configuration; nothing where it does not validate."""
    try:
        config = parse(spec.workload, spec.config)
    except (SpecError, ValidationError):
        return {}
    return {
        "context_tokens": config.context_tokens,
        "workers": config.resources.workers,
        "seed": config.training.seed,
    }


def keep_tokenizer(
    source: Path | None, checkpoints: CheckpointStore, resumed_from: Checkpoint | None
) -> None:
    """Copy the tokenizer's files beside the checkpoints, which can then be used alone. Those that the job's checkpoint
    was written with stay: its manifest has their hashes. None: the data are token ids.
    """
    if source is None:
        return None
    damaged = False
    if resumed_from is not None and resumed_from.store.address == checkpoints.address:
        try:
            return verify_tokenizer(resumed_from)
        except CheckpointError as error:
            print(f"{error.message}; they are copied again", file=sys.stderr, flush=True)
            damaged = True
    files = [source] if source.is_file() else [f for f in source.iterdir() if f.name in TOKENIZER_FILES]
    named = {"tokenizer.json" if file == source else file.name: file for file in files}
    checkpoints.put_tokenizer(named, replace=damaged)


def choose_checkpoint(spec: AttemptSpec, config: TrainedConfig, tokenizer: str) -> Checkpoint | None:
    """The newest good checkpoint of the job, else of its trunk before the decay, else of the job to resume from, else
    none; refused ones are printed.

    Raises CheckpointError where it does not fit, where the job has checkpoints and none of them is good, or where the
    job to resume from has no good one.
    """
    found = _newest(spec.checkpoints)
    if found is None and spec.trunk:
        found = _of_trunk(spec.trunk, config)
    if found is None and spec.resume_from:
        found = _newest(spec.resume_from)
        if found is None:
            raise CheckpointError(f"there is no good checkpoint in {spec.resume_from} to resume from")
    if found is not None:
        check_fits(found, config.model.model_dump(mode="json"), tokenizer, _as_written_now)
    return found


def _as_written_now(model: dict[str, Any]) -> dict[str, Any]:
    """A stored model's configuration, read and written: `exact` with a window is `window` since there is such a kind.
    One that does not validate stays as it is, and differs.
    """
    try:
        return ModelConfig(**model).model_dump(mode="json")
    except (TypeError, ValidationError):
        return model


def _of_trunk(address: str, config: TrainedConfig) -> Checkpoint | None:
    """The newest good checkpoint that the run passes through, too: none later than its decay starts. A damaged one only
    costs the steps that are made again.
    """
    for found in reversed(list_checkpoints(open_checkpoints(address))):
        if found.step > config.decay_start_step:
            continue
        try:
            verify(found)
        except CheckpointError as error:
            print(f"refused: {error}", file=sys.stderr, flush=True)
            continue
        return found
    return None


def _newest(address: str) -> Checkpoint | None:
    found, refused = newest(open_checkpoints(address), RESUMABLE)
    for error in refused:
        print(f"refused: {error}", file=sys.stderr, flush=True)
    return found
