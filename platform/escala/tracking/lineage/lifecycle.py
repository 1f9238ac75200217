"""One attempt of a job, from its spec to its outcome: the same for training, for a sweep, for its trials, and for
workloads that train nothing.

    with LiveAttempt(spec) as attempt:          # from here on whatever happens is in the outcome
        config = attempt.open(parse)            # versions, fence, configuration; the tracker's run
        attempt.reads(fingerprints)             # what data it reads, where it reads any
        ...                                     # the work
    return attempt.exit_code                    # the record and the outcome are written, in this order
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from escala.contract import failures, handshake
from escala.contract.attempt import check_fence, finish, flatten, read_attempt
from escala.contract.errors import EscalaError, SpecError
from escala.contract.failures import UNEXPLAINED, Classify
from escala.contract.records import (
    STOP_REASONS,
    AttemptFiles,
    AttemptSpec,
    Control,
    Outcome,
    Progress,
    RunRecord,
    read_record,
    to_plain,
)
from escala.contract.redaction import hide_in, print_exception
from escala.tracking.base import Tracker
from escala.tracking.lineage import code_fingerprint, fingerprint
from escala.tracking.lineage.datasets import dataset_of
from escala.tracking.lineage.notes import NOTE_TAG, TRIAL_TAG, run_note, start_tags
from escala.tracking.tracker import open_tracker

C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True)
class RunSummary:
    """What an attempt says of itself at its end, however it ends.

    Args:
        values: fields of its RunRecord, beside those that every attempt has.
        rows: more facts of its note, by name.
        tags, texts: more tags and artifacts (path -> content) of its tracker run.
        checkpoint: the last good one.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[tuple[str, str]] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str | None = None


class LiveAttempt:
    """An attempt while its process works on it: a context manager. `outcome` may be set in it to another clean end.

    Args:
        classify, summarise: what an error amounts to; the attempt's summary, asked for at its end. Both may be
            replaced once more is known.
        whole_process: the process is there for this attempt alone: an exit of the interpreter is a failure, too.
    """

    def __init__(
        self,
        spec: AttemptSpec,
        classify: Classify = failures.classify,
        summarise: Callable[[LiveAttempt], RunSummary] | None = None,
        whole_process: bool = True,
    ) -> None:
        self.spec, self.files = spec, AttemptFiles(spec.directory)
        self.classify, self.summarise, self._whole_process = classify, summarise or elapsed, whole_process
        self.started_at = time.time()
        self.fingerprints: dict[str, str] = {}
        self.outcome, self.exit_code = Outcome("succeeded"), 0
        self.checkpoint: str | None = None  # that it goes on from
        self._tracker: Tracker | None = None
        self._run_id = ""

    @property
    def run(self) -> tuple[Tracker, str]:
        """The tracker, and its run's id. Raises RuntimeError before `open`."""
        if self._tracker is None or not self._run_id:
            raise RuntimeError("open() comes first")
        return self._tracker, self._run_id

    def __enter__(self) -> LiveAttempt:
        return self

    def open(self, parse: Callable[[dict[str, Any]], C]) -> C:
        """Check versions, fence and configuration, and open the tracker's run; the configuration.

        Raises VersionError, Superseded, and SpecError for a configuration that `parse` (or pydantic in it) refuses.
        """
        spec = self.spec
        handshake.check(spec.versions)
        check_fence(self.files, spec.attempt)
        try:
            config = parse(spec.config)
        except ValidationError as error:
            raise SpecError(f"the {spec.workload} configuration is not valid: {error}") from error
        resolved = config.model_dump(mode="json")
        tags = identity_tags(spec) | {
            "escala.config_fingerprint": fingerprint(spec.config),
            "escala.code_fingerprint": code_fingerprint().fingerprint,
            **start_tags(spec),
        }
        self._tracker = tracker = open_tracker(spec.tracking_uri)
        self._run_id = tracker.start(run_key(spec), spec.experiment, run_name(spec), tags, flatten(resolved))
        tracker.text(self._run_id, "config.json", json.dumps(hide_in(resolved), indent=1, sort_keys=True))
        return config

    def reads(self, fingerprints: dict[str, str]) -> None:
        """Say what data the attempt reads (fingerprints of corpus, tokenizer, evaluation)."""
        tracker, run_id = self.run
        self.fingerprints = fingerprints
        tracker.tags(run_id, {f"escala.{key}_fingerprint": value for key, value in fingerprints.items()})
        tracker.dataset(run_id, dataset_of(self.spec.config, fingerprints))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            self._conclude(self.outcome)
        elif isinstance(error, Exception) or self._whole_process:
            self._fail(error)
        else:
            return False
        return True

    def _fail(self, error: BaseException) -> None:
        """Classify `error` and write it down."""
        failure = self.classify(error)
        if failure.kind in UNEXPLAINED:
            print_exception(error)
            if stop := self._stopped_at_its_start():
                self.outcome = Outcome(stop, "stopped before its first step")
                finish(self.spec, self.outcome)  # its tracker run is the control plane's to close
                return
        self.outcome, self.exit_code = Outcome(failure.kind, failure.message, failure.hint), failure.exit_code
        if failure.kind == "superseded":
            # In this attempt's own directory; its tracker run is the control plane's now.
            finish(self.spec, self.outcome)
        else:
            self._conclude(self.outcome)

    def _stopped_at_its_start(self) -> str | None:
        """The reason for which the attempt was asked to stop before its first step: its processes are killed then, and
        this one may live to see the others' deaths.
        """
        control = read_record(Control, self.files.control)
        progress = read_record(Progress, self.files.progress)
        return control.stop if control and not (progress and progress.trained) else None

    def _conclude(self, outcome: Outcome) -> None:
        """Record, tracker, outcome: in this order, the outcome last."""
        summary = self.summarise(self)
        record = self._record(outcome, summary.values)
        plain = to_plain(record)
        self.outcome = Outcome(outcome.kind, outcome.message, outcome.hint, summary.checkpoint, plain)
        if self._tracker is not None and self._run_id:
            tracker, run_id = self.run
            for path, text in summary.texts.items():
                tracker.text(run_id, path, text)
            tracker.text(run_id, "run_record.json", json.dumps(plain, indent=1, sort_keys=True))
            known = {k: v for k, v in plain.items() if v is not None}
            note = run_note(self.spec, record, summary.rows, outcome.hint, summary.checkpoint)
            tags = {
                "escala.record": json.dumps(known, separators=(",", ":"), sort_keys=True),
                NOTE_TAG: note,
                **summary.tags,
            }
            tracker.tags(run_id, tags)
            tracker.finish(run_id, run_status(self.outcome))
            tracker.drain()
        finish(self.spec, self.outcome)
        if outcome.kind != "succeeded" and outcome.kind not in STOP_REASONS:
            self.exit_code = self.exit_code or 1

    def _record(self, outcome: Outcome, values: Mapping[str, Any]) -> RunRecord:
        spec = self.spec
        return RunRecord(
            run_id=self._run_id or None,
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
            **{**values, **{f"{k}_fingerprint": v for k, v in self.fingerprints.items()}},
        )


def run_attempt(
    arguments: list[str],
    work: Callable[[LiveAttempt], None],
    classify: Classify = failures.classify,
    summarise: Callable[[LiveAttempt], RunSummary] | None = None,
) -> int:
    """Run the attempt whose spec is the only argument; the process's exit code (0 for every clean end)."""
    try:
        spec = read_attempt(arguments)
    except EscalaError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    with LiveAttempt(spec, classify, summarise) as attempt:
        work(attempt)
    return attempt.exit_code


def elapsed(attempt: LiveAttempt) -> RunSummary:
    """What an attempt that trains nothing says: how long it took, on how many workers."""
    workers = attempt.spec.config.get("resources", {}).get("workers")
    return RunSummary({"wall_seconds": time.time() - attempt.started_at, "workers": workers})


def run_status(outcome: Outcome) -> str:
    """MLflow's word for how an attempt ended. One that was stopped before it had a record did nothing of its own."""
    if outcome.kind in STOP_REASONS:
        return "FINISHED" if outcome.kind == "budget" and outcome.record is not None else "KILLED"
    return "FINISHED" if outcome.kind == "succeeded" else "FAILED"


def run_key(spec: AttemptSpec) -> str:
    """The tracker's key of the attempt's run."""
    return spec.run_key or f"{spec.job_id}-{spec.attempt}"


def run_name(spec: AttemptSpec) -> str:
    """For people. A trial's attempts have one name."""
    return (
        spec.name if spec.attempt == 1 or TRIAL_TAG in spec.tags else f"{spec.name} (attempt {spec.attempt})"
    )


def identity_tags(spec: AttemptSpec) -> dict[str, str]:
    """By which a run is found: its job, its attempt, what was run; and the job's own tags."""
    return spec.tags | {
        "escala.job_id": spec.job_id,
        "escala.attempt": str(spec.attempt),
        "escala.workload": spec.workload,
        "escala.name": spec.name,
    }
