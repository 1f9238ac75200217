"""Sealed forecasts: what a law said of a run before it started, in a chain that nobody can rewrite (docs/theory D.8).

HOME/forecasts/chain.jsonl holds an entry a line, forecasts and their scores alike; an entry's hash covers the entry
before, and the hash of the last one (the head) is kept in MLflow before the run is queued. So a forecast can neither be
changed nor taken back without `problems` saying so: what has been sealed and not scored is shown as such.

A forecast is of one configuration. The first run of exactly that configuration that starts afterwards scores it; one
that was sealed for a point alone is scored by the first run at that point which reads the law's text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from escala.contract import lines
from escala.contract.errors import ClusterError, LawError, NotFoundError
from escala.contract.fields import build
from escala.contract.files import write_whole
from escala.contract.records import AttemptFiles, AttemptSpec, Outcome, read_record
from escala.laws.drift import FINGERPRINTS, wilson
from escala.laws.forms import known_inputs
from escala.laws.reference import Stored
from escala.report import Report, silent
from escala.settings import Settings
from escala.storage.locks import locked
from escala.tracking.lineage import canonical_json, code_fingerprint, fingerprint
from escala.tracking.mlflow_tracker import open_client, tracker_error
from escala.tracking.spool import SpoolTracker

log = logging.getLogger("escala.forecasts")
LEVEL = 0.9
GENESIS = "0" * 64  # what the first entry covers
SAME_POINT = 1e-3  # relative: a run so near to a sealed point is at it
ID_CHARACTERS = 10  # of the hash, which name a forecast
FACTORS = (1.0, 2.0, 4.0)  # beyond the data: inside, up to twice, up to four times, farther
HEAD_TAG = "escala.forecasts"  # of the laws' experiment, a tag per home: escala.forecasts.FIRST_HASH


@dataclass(frozen=True)
class Sealed:
    """What a law said. `point`: the law's inputs. `configuration`: fingerprint of the run's, None of a bare point.
    Losses in nats per token, the interval at `level`.
    """

    law: str  # name@version
    name: str  # of what is to be run, for people
    point: dict[str, float]
    loss_nats: float
    low_nats: float
    high_nats: float
    level: float
    extrapolation: dict[str, float]  # by input: the factor beyond the law's data, 1 is inside
    configuration: str | None
    recipe: dict[str, Any] | None  # the configuration itself
    text: dict[str, str]  # fingerprints of the tokenizer and of the held-out text that the loss is of
    code_fingerprint: str
    git_commit: str | None
    sealed_at: float  # Unix seconds


@dataclass(frozen=True)
class Score:
    """What came of a forecast; `reason` where its run has no loss that can be compared."""

    forecast: str  # the hash of its entry
    run_id: str
    obtained_nats: float | None
    reason: str | None
    started_at: float
    scored_at: float


@dataclass(frozen=True)
class Link:
    """A link of the chain. `hash`: of the entry before, the number, the kind and the body."""

    number: int  # from 1
    kind: str  # forecast or score
    body: dict[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True)
class Head:
    """The last entry, as MLflow keeps it; `home`: HOST:PATH of the home whose chain it ends."""

    number: int
    hash: str
    home: str = ""


@dataclass(frozen=True)
class Forecast:
    """A sealed forecast with what came of it. `id`: the start of its entry's hash."""

    id: str
    number: int
    sealed: Sealed
    score: Score | None  # None: its run has not ended

    @property
    def obtained_nats(self) -> float | None:
        """The held-out loss of its run."""
        return None if self.score is None else self.score.obtained_nats

    @property
    def inside(self) -> bool | None:
        """Whether the loss fell into the interval; None while there is none."""
        obtained = self.obtained_nats
        return None if obtained is None else self.sealed.low_nats <= obtained <= self.sealed.high_nats

    @property
    def error(self) -> float | None:
        """Relative: obtained / predicted - 1."""
        obtained = self.obtained_nats
        return None if obtained is None else obtained / self.sealed.loss_nats - 1

    @property
    def width(self) -> float:
        """Of the interval, relative to the prediction."""
        return (self.sealed.high_nats - self.sealed.low_nats) / self.sealed.loss_nats

    @property
    def factor(self) -> float:
        """The largest factor beyond the law's data."""
        return max(self.sealed.extrapolation.values(), default=1.0)


@dataclass(frozen=True)
class Coverage:
    """Scored forecasts together. `coverage_low`, `coverage_high`: 95 % Wilson interval of the true coverage."""

    label: str
    scored: int
    inside: int
    coverage_low: float | None
    coverage_high: float | None
    median_error: float | None  # relative, absolute value
    median_width: float | None


def digest_of(configuration: Mapping[str, Any]) -> str:
    """The fingerprint by which a forecast finds its run: of the resolved configuration, as an attempt has it."""
    return fingerprint(dict(configuration))


def forecast(
    stored: Stored, point: Mapping[str, float], name: str, configuration: Mapping[str, Any] | None = None
) -> Sealed:
    """What the law says of `point`, ready to be sealed. Raises LawError for a law without intervals, and for a point
    that it cannot read.

    Args:
        point: more inputs than the law reads count for the extrapolation alone.
        configuration: the run's, resolved; None: any run at that point is meant.
    """
    said = stored.law.predict(LEVEL, **point)
    if said.low_nats is None or said.high_nats is None:
        raise LawError(
            f"{stored.reference} has no interval, and a point alone is no forecast.",
            f"`escala laws show {stored.reference}` says why it has none.",
        )
    code = code_fingerprint()
    return Sealed(
        law=stored.reference,
        name=name,
        point={key: float(value) for key, value in point.items()},
        loss_nats=said.loss_nats,
        low_nats=said.low_nats,
        high_nats=said.high_nats,
        level=LEVEL,
        extrapolation=dict(said.extrapolation),
        configuration=None if configuration is None else digest_of(configuration),
        recipe=None if configuration is None else dict(configuration),
        text={key: stored.provenance[key] for key in FINGERPRINTS if stored.provenance.get(key)},
        code_fingerprint=code.fingerprint,
        git_commit=code.git_commit,
        sealed_at=time.time(),
    )


# The chain


class Chain:
    """HOME/forecasts/chain.jsonl."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._path = home / "forecasts" / "chain.jsonl"

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other process reads, adds and tells MLflow meanwhile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._path.with_suffix(".lock")):
            yield

    @property
    def id(self) -> str:
        """A name of its own, made with the chain: that of its head in MLflow, which the entries cannot change."""
        path = self._path.with_name("id")
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, uuid.uuid4().hex.encode())
            return path.read_text().strip()

    def read(self) -> list[Link]:
        """All entries, in order; a line that a kill cut short is none."""
        return [entry for row in lines.objects(self._path) if (entry := _entry(row)) is not None]

    def append(self, kind: str, records: Sequence[Sealed | Score]) -> list[Link]:
        """Add entries, on the disk when this returns; within `held`. Raises OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        known = self.read()
        number, previous = (known[-1].number, known[-1].hash) if known else (0, GENESIS)
        made = []
        for record in records:
            number += 1
            # As it will be read: JSON has no tuples, and keys are strings.
            body = json.loads(canonical_json(asdict(record)))
            made.append(Link(number, kind, body, previous, link(previous, number, kind, body)))
            previous = made[-1].hash
        lines.append(self._path, b"".join(canonical_json(asdict(each)).encode() + b"\n" for each in made))
        return made

    def forecasts(self) -> list[Forecast]:
        """Every forecast, oldest first, with its last score; one with a loss is final."""
        entries = self.read()
        scores: dict[str, Score] = {}
        for entry in entries:
            if entry.kind == "score":
                score = build(Score, entry.body)
                if score.forecast not in scores or scores[score.forecast].obtained_nats is None:
                    scores[score.forecast] = score
        return [
            Forecast(e.hash[:ID_CHARACTERS], e.number, build(Sealed, e.body), scores.get(e.hash))
            for e in entries
            if e.kind == "forecast"
        ]

    def find(self, text: str) -> Forecast:
        """The forecast whose id begins with `text`. Raises NotFoundError for none, and for several."""
        found = [each for each in self.forecasts() if each.id.startswith(text)]
        if len(found) != 1:
            said = "there is no forecast" if not found else f"{len(found)} forecasts begin with"
            raise NotFoundError(f"{said} {text}", "`escala forecasts list` shows their ids")
        return found[0]


def link(previous: str, number: int, kind: str, body: Mapping[str, Any]) -> str:
    """The hash of an entry: SHA-256 of the hash before it and of its own content as canonical JSON."""
    content = canonical_json({"number": number, "kind": kind, "body": dict(body)})
    return hashlib.sha256(f"{previous}\n{content}".encode()).hexdigest()


def _entry(row: Mapping[str, Any]) -> Link | None:
    try:
        return build(Link, row)
    except ValueError:
        return None


def problems(entries: Sequence[Link], head: Head | None, others: Sequence[Head] = ()) -> list[str]:
    """What is wrong with a chain, in plain words; empty where nothing is.

    Args:
        head: as MLflow keeps it; None: it keeps none.
        others: heads of other chains of this very home, which were there before this one.
    """
    previous = GENESIS
    for place, entry in enumerate(entries, 1):
        if entry.number != place:
            return [f"entry {place} has the number {entry.number}: one is missing, or they were reordered"]
        if entry.previous != previous:
            return [f"entry {place} does not follow entry {place - 1}: one of the two was changed"]
        if entry.hash != link(previous, entry.number, entry.kind, entry.body):
            return [f"entry {place} was changed after it was sealed"]
        previous = entry.hash
    if others:
        return [f"MLflow knows another chain of this home, of {others[0].number} entries: it was removed"]
    if head is None:
        return ["MLflow keeps no head of this chain"] if entries else []
    if head.number > len(entries):
        return [f"MLflow knows {head.number} entries and the chain has {len(entries)}: its end was removed"]
    if head.number and entries[head.number - 1].hash != head.hash:
        return [f"entry {head.number} is not the one whose hash MLflow keeps: the chain was rewritten"]
    return []


def not_kept(entries: Sequence[Link], head: Head | None) -> int:
    """How many entries are newer than the head in MLflow: scores that were written while it was away."""
    return len(entries) - (0 if head is None else head.number)


# The head, in MLflow


def push_head(tracker: str, experiment: str, chain: Chain) -> None:
    """Keep the head of the chain in MLflow; within `Chain.held`. Raises ClusterError where that is away."""
    entries = chain.read()
    if not entries:
        return
    kept = Head(entries[-1].number, entries[-1].hash, _place(chain))
    with _laws_experiment(tracker, experiment) as (client, experiment_id, _):
        client.set_experiment_tag(experiment_id, f"{HEAD_TAG}.{chain.id}", json.dumps(asdict(kept)))


def read_heads(tracker: str, experiment: str, chain: Chain) -> tuple[Head | None, list[Head]]:
    """(the head that MLflow keeps of this chain, those of other chains of this home). Raises ClusterError."""
    with _laws_experiment(tracker, experiment) as (_, _, tags):
        heads = {
            name: Head(**json.loads(text)) for name, text in tags.items() if name.startswith(f"{HEAD_TAG}.")
        }
    own, place = f"{HEAD_TAG}.{chain.id}", _place(chain)
    return heads.get(own), [head for name, head in heads.items() if name != own and head.home == place]


def _place(chain: Chain) -> str:
    return f"{socket.gethostname()}:{chain.home}"


@contextmanager
def _laws_experiment(tracker: str, name: str) -> Iterator[tuple[Any, str, dict[str, str]]]:
    """(MLflow's client, the experiment's id, its tags); what MLflow raises becomes ClusterError."""
    client = open_client(tracker)
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_experiment_by_name(name)
        if found is None:
            yield client, client.create_experiment(name), {}
        else:
            yield client, found.experiment_id, dict(found.tags)
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        raise tracker_error(tracker, error) from error


# Sealing and scoring


def seal(home: Path, tracker: str, experiment: str, made: Sequence[Sealed]) -> list[Forecast]:
    """Append forecasts to the home's chain, and keep its head in MLflow: only then may their runs be queued.

    A forecast that is open already (the same law, point and configuration) is not sealed again: a client that was
    killed between sealing and queueing begins again where it was.

    Raises ClusterError where MLflow is away: the forecasts are in the chain then, and nothing may be queued.
    """
    chain = Chain(home)
    with chain.held():
        try:
            head, others = read_heads(tracker, experiment, chain)
            wrong = problems(chain.read(), head, others)
            if (
                wrong and head is None and not others
            ):  # nothing was ever kept: a first head that did not arrive
                wrong = problems(chain.read(), Head(0, GENESIS))
            if wrong:
                raise ClusterError(
                    f"the chain of forecasts is broken: {wrong[0]}",
                    "`escala forecasts verify`; restore HOME/forecasts from a backup",
                )
            known = {_same(each.sealed): each for each in chain.forecasts() if each.obtained_nats is None}
            fresh = [each for each in made if _same(each) not in known]
            added = chain.append("forecast", fresh)
            push_head(tracker, experiment, chain)
        except ClusterError as error:
            raise ClusterError(
                f"{error.message}; so nothing is sealed, and nothing was queued", error.hint
            ) from error
    now = {
        _same(sealed): Forecast(entry.hash[:ID_CHARACTERS], entry.number, sealed, None)
        for entry, sealed in zip(added, fresh, strict=True)
    }
    return [(known | now)[_same(each)] for each in made]


def _same(sealed: Sealed) -> tuple[str, str | None, str]:
    return sealed.law, sealed.configuration, canonical_json(sealed.point)


def seal_runs(
    settings: Settings, stored: Stored, runs: Sequence[tuple[str, Mapping[str, Any]]], report: Report = silent
) -> list[Forecast]:
    """Seal what a law says of pretraining runs that are about to be queued: (name, resolved configuration) of each.

    Brings the embedded tracker up, where that is the one. Raises LawError, ClusterError; nothing may be queued then.
    """
    made = [forecast(stored, point_of(config), name, config) for name, config in runs]
    found = seal_now(settings, made, report)
    for each in found[:3]:
        sealed = each.sealed
        report(
            f"sealed {each.id}: {sealed.law} predicts {sealed.loss_nats:.4f} "
            f"({sealed.level:.0%} from {sealed.low_nats:.4f} to {sealed.high_nats:.4f})"
        )
    if len(found) > 3:
        report(f"and {len(found) - 3} more")
    return found


def seal_now(settings: Settings, made: Sequence[Sealed], report: Report = silent) -> list[Forecast]:
    """As `seal`, in this home and its tracker, which is brought up where it is the embedded one."""
    if settings.tracking_uri is None:
        from escala import cluster

        cluster.up(settings, report)
    return seal(settings.home, settings.tracker, experiment_of(settings), made)


def experiment_of(settings: Settings) -> str:
    """The MLflow experiment that keeps the head: that of the laws' runs."""
    return f"{settings.experiment}-laws"


def point_of(config: Mapping[str, Any]) -> dict[str, float]:
    """The inputs of a law that a pretraining run has, from its resolved configuration. Raises SpecError."""
    from escala import spec
    from escala.schema import PretrainConfig
    from escala.schema.flops import parameter_counts

    job = spec.load_job("pretrain", base=config)
    answer = spec.resolve(job)
    trained = PretrainConfig.model_validate(job.plain())
    point = {
        "n_total": float(answer.n_total),
        "n_active": float(answer.n_active),
        "n_non_embedding": float(parameter_counts(trained.model).n_non_embedding),
        "tokens": float(answer.train_tokens),
        "context_tokens": float(trained.context_tokens),
        "compute_flops": float(answer.compute_flops),
    }
    moe = trained.model.moe
    if moe is not None and moe.capacity_factor is not None:
        point["capacity_factor"] = float(moe.capacity_factor)
    return point


def score_run(home: Path, tracker: str, experiment: str, directory: Path) -> list[Score]:
    """Score the open forecasts that the run of an attempt answers, once it has ended.

    A tracker that is away loses nothing: the score is in the chain, and the next head that is kept covers it.
    """
    chain = Chain(home)
    files = AttemptFiles(directory)
    spec, outcome = read_record(AttemptSpec, files.spec), read_record(Outcome, files.outcome)
    if spec is None or outcome is None or not any(f.obtained_nats is None for f in chain.forecasts()):
        return []
    run_id = (files.spool / "run_id").read_text().strip() if (files.spool / "run_id").exists() else ""
    run = _Run(run_id, digest_of(spec.config), _began(directory, spec, outcome), outcome)
    with chain.held():
        hashes = {entry.number: entry.hash for entry in chain.read()}
        opened = [f for f in chain.forecasts() if f.obtained_nats is None]
        fresh = [f for f in opened if f.score is None or f.score.run_id != run_id]
        made = [score for each in fresh if (score := _score(each, hashes[each.number], run)) is not None]
        if made:
            _add_scores(chain, tracker, experiment, made)
    if made:
        _tell(files, run_id, chain.forecasts(), {score.forecast for score in made})
    return made


def _add_scores(chain: Chain, tracker: str, experiment: str, made: Sequence[Score]) -> None:
    """Append, and keep the new head, where MLflow answers and the chain is the one that it knows."""
    try:
        wrong = problems(chain.read(), *read_heads(tracker, experiment, chain))
        chain.append("score", made)
        if wrong:
            log.warning("the chain of forecasts is broken: %s; `escala forecasts verify`", wrong[0])
        else:
            push_head(tracker, experiment, chain)
    except ClusterError as error:
        chain.append("score", [each for each in made if each.forecast not in _scored(chain)])
        log.warning("the head of the forecasts' chain is not in MLflow yet: %s", error.message)


def _scored(chain: Chain) -> set[str]:
    return {build(Score, entry.body).forecast for entry in chain.read() if entry.kind == "score"}


@dataclass(frozen=True)
class _Run:
    """A run that has ended. `began`: when its first step may have been made; Unix seconds."""

    run_id: str
    configuration: str
    began: float
    outcome: Outcome


def _began(directory: Path, spec: AttemptSpec, outcome: Outcome) -> float:
    """Of a job's later attempt the first one's start: it goes on from there; of one that resumes another job 0."""
    if spec.resume_from:
        return 0.0
    first = directory.parent / "attempt-1" / directory.joinpath("attempt.json").name
    started = [float((outcome.record or {}).get("started_at") or time.time())]
    started += [first.stat().st_mtime] if spec.attempt > 1 and first.exists() else []
    return min(started)


def _tell(files: AttemptFiles, run_id: str, found: Sequence[Forecast], scored: set[str]) -> None:
    """A tag of the run in MLflow: what was sealed, what was obtained."""
    told = [each for each in found if any(entry.startswith(each.id) for entry in scored)]
    text = "; ".join(
        f"{each.id}: {each.sealed.law} said {each.sealed.loss_nats:.4f} ({each.sealed.low_nats:.4f} to "
        f"{each.sealed.high_nats:.4f})"
        + (f", obtained {each.obtained_nats:.4f}" if each.obtained_nats is not None else ", not scored")
        for each in told
    )
    if run_id and text:
        SpoolTracker(files.spool, holds=False).tags(run_id, {"escala.forecast": text})


def _score(each: Forecast, entry: str, run: _Run) -> Score | None:
    """The score that a run gives; None where the forecast is not of it."""
    sealed, record = each.sealed, run.outcome.record or {}
    if run.began < sealed.sealed_at:
        return None
    score = Score(entry, run.run_id, None, None, run.began, time.time())
    loss = record.get("held_out_loss_nats")
    finished = record.get("status") == "succeeded" and loss is not None
    same_text = all(record.get(name) == value for name, value in sealed.text.items())
    if sealed.configuration is None:
        comparable = finished and same_text and _at(sealed.point, record)
        return replace(score, obtained_nats=float(record["held_out_loss_nats"])) if comparable else None
    if sealed.configuration != run.configuration:
        return None
    if not finished:
        said = record.get("reason") or run.outcome.message or "no held-out loss"
        return replace(score, reason=f"the run {record.get('status') or run.outcome.kind}: {said}")
    if not same_text:
        return replace(
            score, reason="the run reads another text, or has another tokenizer, than the law's runs"
        )
    return replace(score, obtained_nats=float(record["held_out_loss_nats"]))


def _at(point: Mapping[str, float], record: Mapping[str, Any]) -> bool:
    known = known_inputs()
    values = {name: record.get(known[name].field) for name in point if name in known}
    return all(v is not None and abs(float(v) / point[name] - 1) <= SAME_POINT for name, v in values.items())


# Together


def coverage(label: str, found: Sequence[Forecast]) -> Coverage:
    """Of those that have a loss."""
    scored = [each for each in found if each.inside is not None]
    inside = sum(bool(each.inside) for each in scored)
    if not scored:
        return Coverage(label, 0, 0, None, None, None, None)
    low, high = wilson(inside, len(scored))
    errors = [abs(each.error) for each in scored if each.error is not None]
    return Coverage(label, len(scored), inside, low, high, median(errors), median(e.width for e in scored))


def by_factor(found: Sequence[Forecast]) -> list[Coverage]:
    """Coverage by how far beyond the law's data a run was; factors that no run had are left out."""
    labels = ["inside the data", *(f"{a:g} to {b:g} times" for a, b in pairwise(FACTORS))]
    labels.append(f"beyond {FACTORS[-1]:g} times")
    bins: dict[str, list[Forecast]] = {label: [] for label in labels}
    for each in found:
        bins[labels[sum(each.factor > edge * (1 + 1e-9) for edge in FACTORS)]].append(each)
    parts = [coverage(label, each) for label, each in bins.items()]
    return [part for part in parts if part.scored]
