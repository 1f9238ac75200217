"""Records that cross a folder: frozen dataclasses, the standard library and no more. Field names carry units.

A missing number is None, never zero. Every record's JSON has the version of its format (`FORMAT`): one of a newer
format is refused by name, one of an older format is read as what it meant.

An attempt's directory (`AttemptFiles`) is the contract between the control plane, which starts a job and
watches it, and the workload, which runs somewhere on the cluster and sees the same storage. All files are written
whole and renamed (`write_json`), so a reader sees an old state or a new one, never half of one.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from escala.contract import fields
from escala.contract.errors import VersionError
from escala.contract.files import set_aside, write_whole

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
FORMAT = 2
"""Of records as JSON. 1: of escala 0.1, which does not say it; the same fields."""
LARGEST_BYTES = 64 * 2**20  # of a record's file
TEXT_CHARACTERS = 20_000  # of an outcome's message and hint: the database keeps no more
TRIALS = "trials.jsonl"
STOP_REASONS = ("user", "budget", "preempted")  # Control.stop, and the outcomes of those that obey

ONE_NODE = "ESCALA_ONE_NODE"
"""Set in a job's environment where its cluster has one node and gets no other."""
SAMPLES = "samples.json"  # the table of what a policy said, an artifact of its run


def write_json(path: Path, value: Any) -> None:
    """Write `value` (a dataclass or plain data) to `path` so that no reader ever sees a part of it, even after
    a power cut. Raises OSError.
    """
    write_whole(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """`value` (a dataclass or plain data) as it is written."""
    whole = to_plain(value) if is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(whole, indent=1, sort_keys=True).encode()


def to_plain(record: DataclassInstance) -> dict[str, Any]:
    """A record as plain data, with its format."""
    return {"format": FORMAT, **asdict(record)}


def load_record(kind: type[T], path: Path) -> T:
    """The record of type `kind` in `path`. Keys that it has not are left out.

    Raises FileNotFoundError, another OSError where it cannot be read, ValueError where it is damaged, VersionError for
    one of a newer format.
    """
    return parse_record(kind, read_regular(path), str(path))


def parse_record(kind: type[T], content: bytes, where: str) -> T:
    """The record of type `kind` in the content of a file. Raises ValueError where it is damaged, VersionError."""
    found = fields.parse(content)
    if isinstance(found, dict):
        check_format(found, where)
    return fields.build(kind, found)


def check_format(plain: Mapping[str, Any], where: str) -> None:
    """Raise VersionError where a record as plain data has a newer format, ValueError where its format is no number."""
    version = plain.get("format", 1)
    if not isinstance(version, int) or isinstance(version, bool):
        raise ValueError(f"its format is {version!r:.40}")
    if version > FORMAT:
        raise VersionError(
            f"{where} has format {version}; this version of escala reads formats up to {FORMAT}",
            "use the version of escala that wrote it, or a newer one",
        )


def read_record(kind: type[T], path: Path) -> T | None:
    """The record in `path`; None where the file does not exist, and where it is damaged: then it is set aside,
    with the reason in the log, so that it stops nobody twice. Raises OSError where it cannot be read, and VersionError.
    """
    try:
        return load_record(kind, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        set_aside(path, str(error))
        return None


def read_json(path: Path) -> Any:
    """The value in `path`. Raises OSError, and ValueError where it is damaged."""
    return fields.parse(read_regular(path))


def read_regular(path: Path, start: int = 0) -> bytes:
    """The content of a file from byte `start` on. Raises OSError, and ValueError for what is no regular file, or too
    large.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size - start > LARGEST_BYTES:
        raise ValueError(f"it has more than {LARGEST_BYTES // 2**20} MiB")
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read()


@dataclass(frozen=True)
class Rates:
    """What a device-hour, a joule and a FLOP cost where a job runs, from the cluster's file; None: not stated."""

    cluster: str
    usd_per_device_hour: float | None
    gco2e_per_kwh: float | None
    site_factor: float  # energy at the meter per energy of the devices
    static_watts: float | None  # of a device
    joules_per_flop: float | None
    joules_per_byte: float | None

    def joules(self, devices: int, seconds: float, flops: float, moved_bytes: float) -> float | None:
        """An estimate of the energy at the meter: static + dynamic + memory traffic (docs/theory E.1). None where a
        coefficient is not stated.
        """
        if self.static_watts is None or self.joules_per_flop is None or self.joules_per_byte is None:
            return None
        static = self.static_watts * devices * seconds
        return self.site_factor * (static + self.joules_per_flop * flops + self.joules_per_byte * moved_bytes)

    def usd(self, devices: int, seconds: float) -> float | None:
        """Dollars for `devices` over `seconds`; None where no price is stated."""
        return (
            None if self.usd_per_device_hour is None else self.usd_per_device_hour * devices * seconds / 3600
        )

    def gco2e(self, joules: float | None) -> float | None:
        """Grams of CO2 equivalent of `joules` at the meter; None where either is unknown."""
        if joules is None or self.gco2e_per_kwh is None:
            return None
        return joules / 3.6e6 * self.gco2e_per_kwh


@dataclass(frozen=True)
class AttemptSpec:
    """What a workload is given: the path of this record, as JSON, is its only command-line argument."""

    job_id: str
    attempt: int  # 1, 2, ...
    name: str
    workload: str  # "pretrain"
    entry_point: str  # "workloads.pretrain"
    config: dict[str, Any]  # the resolved workload configuration
    directory: str  # this attempt's directory (AttemptFiles)
    checkpoints: str  # the job's checkpoint directory, shared by its attempts
    data: str  # the content-addressed store of tokenizers and token shards
    tracking_uri: str  # "spool:PATH" or an MLflow address; for tracking.open_tracker
    experiment: str
    tags: dict[str, str] = field(default_factory=dict)
    run_key: str | None = None  # the tracker's key of the run; None: JOB-ATTEMPT
    resume_from: str | None = None  # another job's checkpoint directory, where this job has none of its own
    trunk: str | None = (
        None  # checkpoint directory of the steps that a sweep's branches share (docs/theory D.8)
    )
    remaining_flops: float | None = None  # the job's budget less its earlier attempts
    remaining_seconds: float | None = None
    metric_prefix: str = ""  # before the names of its metrics, where several trainings report to one run
    versions: dict[str, str] = field(default_factory=dict)  # handshake: escala, ray, torch, python


@dataclass(frozen=True)
class Progress:
    """How far an attempt is, and what this attempt (not its predecessors) has spent."""

    step: int
    total_steps: int
    train_tokens: int  # by this attempt
    compute_flops: float  # by this attempt
    wall_seconds: float  # since this attempt's first step
    loss_nats: float | None
    tokens_per_second: float | None
    model_flops_utilization: float | None  # None where the device's peak is unknown
    updated_at: float  # Unix seconds
    remaining_seconds: float | None = None  # to the end, where that does not follow from the steps

    @property
    def trained(self) -> bool:
        """Whether the attempt has made a step; of a sweep, any of the trials that it started."""
        return self.train_tokens > 0


@dataclass(frozen=True)
class Control:
    """What the control plane (or a SIGTERM) asks of a running attempt: stop at the next step, checkpoint first."""

    stop: str  # "user" | "budget" | "preempted"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. Written once, last; an attempt that ends without one was lost.

    kind: "succeeded", or the reason of a clean early end ("user", "budget", "preempted"), or a class of failure
    ("user_error", "out_of_memory", "diverged", "worker_lost", "node_lost", "driver_lost", "superseded", "internal").
    """

    kind: str
    message: str = ""
    hint: str = ""
    checkpoint: str | None = None  # the last good one
    record: dict[str, Any] | None = None  # RunRecord as plain data, where the attempt got far enough


@dataclass(frozen=True)
class RunRecord:
    """What happened in one attempt: one MLflow run. Losses in nats per token, on the held-out set."""

    run_id: str | None
    job_id: str
    attempt: int
    name: str
    workload: str
    status: str  # an Outcome's kind, or "running"
    started_at: float  # Unix seconds
    ended_at: float | None = None
    initial_held_out_loss_nats: float | None = None
    held_out_loss_nats: float | None = None
    held_out_bits_per_byte: float | None = None
    train_loss_nats: float | None = None
    measures: dict[str, float] | None = None  # what else the last evaluation found, by name
    n_total: int | None = None
    n_active: int | None = None
    n_non_embedding: int | None = None
    n_trained: int | None = None  # fewer than n_total with LoRA
    context_tokens: int | None = None
    train_tokens: int | None = None  # seen by the model up to its last step, earlier attempts included
    compute_flops: float | None = None  # the same
    attempt_tokens: int | None = None  # spent by this attempt alone, repeated steps included
    attempt_flops: float | None = None
    wall_seconds: float | None = None
    peak_memory_bytes: int | None = None  # the largest worker's
    idle_memory_bytes: int | None = None  # rank 0's before it built the model
    step_seconds: float | None = None  # the median step's
    communication_bytes: float | None = None  # sent by rank 0 in a step's collectives
    tokens_per_second: float | None = None
    model_flops_utilization: float | None = None
    energy_joules: float | None = None  # at the meter, of this attempt
    joules_per_token: float | None = None  # the same, by its tokens
    energy_source: str | None = None  # the counter that was read, or that it is an estimate
    cost_usd: float | None = None  # of this attempt
    carbon_gco2e: float | None = None  # grams of CO2 equivalent, the same
    workers: int | None = None
    seed: int | None = None
    config_fingerprint: str | None = None
    code_fingerprint: str | None = None
    corpus_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    evaluation_fingerprint: str | None = None
    parent_run_id: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Totals:
    """A job's sums over its attempts. None where no attempt reported."""

    attempts: int
    train_tokens: int | None
    compute_flops: float | None
    wall_seconds: float | None
    energy_joules: float | None


class JobFiles:
    """The names in a job's directory under HOME."""

    def __init__(self, home: Path, job_id: str) -> None:
        self.directory = home / "jobs" / job_id
        self.checkpoints = self.directory / "checkpoints"
        self.trials = self.directory / TRIALS  # of a sweep: a line a trial; by its driver

    def attempt(self, number: int) -> AttemptFiles:
        """The attempt with this number, from 1."""
        return AttemptFiles(self.directory / f"attempt-{number}")


class TrialFiles:
    """The names in the directory of a sweep's trial under HOME: laid out like a job's, named by its content."""

    def __init__(self, home: Path, fingerprint: str) -> None:
        self.directory = home / "trials" / fingerprint
        self.checkpoints = self.directory / "checkpoints"
        self.lock = self.directory / "lock"  # held by the process that trains it

    def attempt(self, number: int) -> AttemptFiles:
        """The attempt with this number, from 1."""
        return AttemptFiles(self.directory / f"attempt-{number}")

    def attempts(self) -> list[AttemptFiles]:
        """Every attempt that there is, oldest first."""
        numbers = (p.name.removeprefix("attempt-") for p in self.directory.glob("attempt-*"))
        return [self.attempt(number) for number in sorted(int(n) for n in numbers if n.isdecimal())]


class TrunkFiles:
    """The names in the directory of a trunk under HOME, beside its sweep's trials: there until all its branches have
    ended.
    """

    def __init__(self, home: Path, fingerprint: str) -> None:
        self.directory = home / "trials" / f"trunk-{fingerprint}"
        self.checkpoints = self.directory / "checkpoints"
        self.lock = self.directory / "lock"  # held by the process that trains its branches


class AttemptFiles:
    """The names in an attempt's directory."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.spec = self.directory / "attempt.json"  # AttemptSpec; by the control plane
        self.control = (
            self.directory / "control.json"
        )  # Control; by the control plane or the driver's SIGTERM
        self.progress = self.directory / "progress.json"  # Progress; by the driver or rank 0
        self.outcome = self.directory / "outcome.json"  # Outcome; by the driver, last
        self.facts = self.directory / "facts.json"  # what rank 0 knows for the RunRecord, and its last word
        self.log = self.directory / "log.txt"  # the driver's and the workers' output
        self.spool = self.directory / "tracking"  # the tracking spool (tracking/spool.py)
        self.current = (
            self.directory.parent / "current"
        )  # the number of the attempt that may write: the fence
