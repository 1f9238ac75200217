"""One attempt of a workload that trains, from its spec to its outcome: the same for every entry point.

The driver prepares data, chooses the checkpoint, starts Ray Train's workers (training/loop.py) and writes the
outcome. It retries nothing: a retry is a new attempt, which the control plane makes from the last checkpoint.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from escala.contract import handshake
from escala.contract.attempt import STOP_REASONS, check_fence, finish, flatten, read_attempt, stop_on_sigterm
from escala.contract.errors import CheckpointError, EscalaError, SpecError
from escala.contract.files import set_aside
from escala.contract.records import (
    AttemptFiles,
    AttemptSpec,
    Outcome,
    Progress,
    RunRecord,
    read_json,
    read_record,
    to_plain,
)
from escala.contract.redaction import hide_in, print_exception
from escala.schema import WORKLOADS, TrainedConfig
from escala.storage.base import CheckpointStore
from escala.storage.checkpoints import Checkpoint, check_fits, newest, open_checkpoints, verify_tokenizer
from escala.tracking.lineage import code_fingerprint, fingerprint
from escala.tracking.lineage.datasets import dataset_of
from escala.tracking.lineage.notes import NOTE_TAG, TRIAL_TAG, run_note, start_tags
from escala.tracking.tracker import Tracker, open_tracker
from workloads.training.driver import WorkerInputs, fit

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",  # the tokens that end an answer
)


@dataclass(frozen=True)
class Prepared:
    """What an entry point has made ready for its workers."""

    path: str  # for `make_task`
    tokenizer: Path  # a tokenizer.json, or a directory with one; it is kept beside the checkpoints
    fingerprints: dict[str, str]  # corpus, tokenizer, evaluation


class Entry(Protocol):
    """The module of a workload that trains.

    One whose steps are no task's has `make_trainer(inputs, on_evaluation)` instead of `make_task`; one that needs
    something to run while its workers do has `beside(inputs)`, a context manager.
    """

    def prepare(self, spec: AttemptSpec, config: Any) -> Prepared:
        """In the driver: data made ready. Raises DataError."""
        ...

    def make_task(self, inputs: WorkerInputs) -> Any:
        """In a worker: its training.task.Task."""
        ...


def main(arguments: list[str]) -> int:
    """Run one attempt; returns the process's exit code (0 for every clean end, else the error's)."""
    try:
        spec = read_attempt(arguments)
    except EscalaError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    run = Run(spec)
    try:
        run.train()
    except BaseException as error:  # noqa: BLE001  whatever happened, the outcome says so
        return run.fail(error)
    return run.succeed()


class Run:
    """One attempt: its tracker run, and its outcome."""

    def __init__(self, spec: AttemptSpec) -> None:
        self.spec, self.files = spec, AttemptFiles(spec.directory)
        self.started_at = time.time()
        self.tracker: Tracker | None = None
        self.run_id: str | None = None
        self.fingerprints: dict[str, str] = {}
        self.resumed_from: Checkpoint | None = None
        self.nodes: Any = None  # failures.NodeWatch, once Ray is reached

    def train(self) -> None:
        """Everything up to the end of training. Raises what goes wrong."""
        config = self.open()
        inputs = self.inputs(entry(self.spec).prepare(self.spec, config), config)

        import ray

        from workloads.training.failures import NodeWatch

        ray.init(address="auto", log_to_driver=True, namespace="escala")
        stop_on_sigterm(self.files)
        self.nodes = NodeWatch()
        with beside(inputs):
            fit(inputs)

    def open(self) -> TrainedConfig:
        """Check versions, fence and configuration, and open the tracker's run."""
        handshake.check(self.spec.versions)
        check_fence(self.files, self.spec.attempt)
        config = parse_config(self.spec)
        self._start_tracking(config)
        return config

    def inputs(self, prepared: Prepared, config: TrainedConfig) -> WorkerInputs:
        """What the training loop is given: the data, and the checkpoint to start from."""
        if self.tracker is None or self.run_id is None:
            raise RuntimeError("open() comes first")
        self.fingerprints = prepared.fingerprints
        tags = {f"escala.{k}_fingerprint": v for k, v in self.fingerprints.items()}
        self.tracker.tags(self.run_id, tags)
        self.tracker.dataset(self.run_id, dataset_of(self.spec.config, self.fingerprints))
        self.resumed_from = choose_checkpoint(self.spec, config, self.fingerprints["tokenizer"])
        keep_tokenizer(prepared.tokenizer, open_checkpoints(self.spec.checkpoints), self.resumed_from)
        source = self.resumed_from.address if self.resumed_from else None
        return WorkerInputs(self.spec, prepared.path, source, self.run_id, self.fingerprints)

    def _start_tracking(self, config: TrainedConfig) -> None:
        spec = self.spec
        resolved = config.model_dump(mode="json")
        self.tracker = tracker = open_tracker(spec.tracking_uri)
        tags = spec.tags | {
            "escala.job_id": spec.job_id,
            "escala.contract.attempt": str(spec.attempt),
            "escala.workload": spec.workload,
            "escala.name": spec.name,
            "escala.config_fingerprint": fingerprint(spec.config),
            "escala.code_fingerprint": code_fingerprint().fingerprint,
            **start_tags(spec),
        }
        key = spec.run_key or f"{spec.job_id}-{spec.attempt}"
        name = (
            spec.name
            if spec.attempt == 1 or TRIAL_TAG in spec.tags
            else f"{spec.name} (attempt {spec.attempt})"
        )
        self.run_id = tracker.start(key, spec.experiment, name, tags, flatten(resolved))
        tracker.text(self.run_id, "config.json", json.dumps(hide_in(resolved), indent=1, sort_keys=True))

    def succeed(self) -> int:
        """A clean end: trained to the last step, or stopped for a stated reason with a checkpoint."""
        kind = self._facts().get("outcome", "internal")
        if kind != "succeeded" and kind not in STOP_REASONS:
            return self.fail(RuntimeError("the workers ended without saying how"))
        status = "FINISHED" if kind in ("succeeded", "budget") else "KILLED"
        self._conclude(Outcome(kind, STOP_MESSAGES[kind]), status)
        return 0

    def fail(self, error: BaseException) -> int:
        """Classify `error` and write it down."""
        from workloads.training.failures import classify

        failure = classify(error, self.nodes)
        if failure.kind in ("internal", "worker_lost", "node_lost"):
            # The others say themselves what is to be done.
            print_exception(error)
        outcome = Outcome(failure.kind, failure.message, failure.hint)
        if failure.kind == "superseded":
            # In this attempt's own directory; its tracker run is the control plane's now.
            finish(self.spec, outcome)
        else:
            self._conclude(outcome, "FAILED")
        return int(failure.exit_code)

    def _conclude(self, outcome: Outcome, status: str) -> None:
        """Record, tracker, outcome: in this order, the outcome last."""
        facts = self._facts()
        record = self._record(outcome, facts)
        plain = to_plain(record)
        source = self.resumed_from.address if self.resumed_from else None
        checkpoint = facts.get("checkpoint", source)
        if self.tracker is not None and self.run_id is not None:
            self.tracker.text(self.run_id, "run_record.json", json.dumps(plain, indent=1, sort_keys=True))
            known = {k: v for k, v in plain.items() if v is not None}
            tags = {
                "escala.record": json.dumps(known, separators=(",", ":"), sort_keys=True),
                NOTE_TAG: run_note(self.spec, record, self._data_rows(), outcome.hint, checkpoint),
            }
            if "parameters_held" in facts:
                tags["escala.parameters_held"] = json.dumps(facts["parameters_held"])
            self.tracker.tags(self.run_id, tags)
            self.tracker.finish(self.run_id, status)
            self.tracker.drain()
        finish(self.spec, Outcome(outcome.kind, outcome.message, outcome.hint, checkpoint, plain))

    def _data_rows(self) -> list[tuple[str, str]]:
        """What the run's note says of its data."""
        if not self.fingerprints:
            return []
        data = dataset_of(self.spec.config, self.fingerprints)
        return [("data", f"{data.name} (`{data.digest[:12]}`)")]

    def _facts(self) -> dict[str, Any]:
        """What rank 0 left (training/report.py); empty where it did not get far enough."""
        try:
            facts: dict[str, Any] = read_json(self.files.facts)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            set_aside(self.files.facts, str(error))
            return {}
        return facts

    def _record(self, outcome: Outcome, facts: dict[str, Any]) -> RunRecord:
        spec, config = self.spec, spec_numbers(self.spec)
        known = {f.name for f in fields(RunRecord)}
        values = config | {k: v for k, v in facts.items() if k in known}
        progress = read_record(Progress, self.files.progress)
        if progress is not None:  # newer than the facts where the attempt was cut off
            values["attempt_tokens"] = max(values.get("attempt_tokens") or 0, progress.train_tokens)
            values["attempt_flops"] = max(values.get("attempt_flops") or 0.0, progress.compute_flops)
            values["wall_seconds"] = max(values.get("wall_seconds") or 0.0, progress.wall_seconds)
        values |= {f"{k}_fingerprint": v for k, v in self.fingerprints.items()}
        return RunRecord(
            run_id=self.run_id,
            job_id=spec.job_id,
            attempt=spec.attempt,
            name=spec.name,
            workload=spec.workload,
            status=outcome.kind,
            started_at=self.started_at,
            ended_at=time.time(),
            config_fingerprint=fingerprint(spec.config),
            code_fingerprint=code_fingerprint().fingerprint,
            parent_run_id=spec.tags.get("escala.parent_run_id"),
            reason=outcome.message or None,
            **values,
        )


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


def entry(spec: AttemptSpec) -> Entry:
    """The workload's module."""
    module: Any = import_module(spec.entry_point)
    return module  # type: ignore[no-any-return]


def beside(inputs: WorkerInputs) -> AbstractContextManager[None]:
    """What the workload wants to run while its workers do."""
    own: Any = getattr(entry(inputs.spec), "beside", None)
    return nullcontext() if own is None else own(inputs)


def parse_config(spec: AttemptSpec) -> TrainedConfig:
    """The validated configuration. Raises SpecError with pydantic's words."""
    try:
        return WORKLOADS[spec.workload].parse(spec.config)
    except ValidationError as error:
        raise SpecError(f"the {spec.workload} configuration is not valid: {error}") from error


def spec_numbers(spec: AttemptSpec) -> dict[str, Any]:
    """What the record takes from the configuration; nothing where it does not validate."""
    try:
        config = parse_config(spec)
    except SpecError:
        return {}
    return {
        "context_tokens": config.context_tokens,
        "workers": config.resources.workers,
        "seed": config.training.seed,
    }


def keep_tokenizer(source: Path, checkpoints: CheckpointStore, resumed_from: Checkpoint | None) -> None:
    """Copy the tokenizer's files beside the checkpoints, which can then be used alone. Those that the job's checkpoint
    was written with stay: its manifest has their hashes.
    """
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
    """The newest good checkpoint of the job, else of the job to resume from, else none; refused ones are
    printed.

    Raises CheckpointError where it does not fit, where the job has checkpoints and none of them is good, or where the
    job to resume from has no good one.
    """
    found = _newest(spec.checkpoints)
    if found is None and spec.resume_from:
        found = _newest(spec.resume_from)
        if found is None:
            raise CheckpointError(f"there is no good checkpoint in {spec.resume_from} to resume from")
    if found is not None:
        check_fits(found, config.model.model_dump(mode="json"), tokenizer)
    return found


def _newest(address: str) -> Checkpoint | None:
    found, refused = newest(open_checkpoints(address), RESUMABLE)
    for error in refused:
        print(f"refused: {error}", file=sys.stderr, flush=True)
    return found
