"""Does a law still hold? Each finished run against each champion's predictive interval, kept for calibration.

A run outside the 99 % interval raises an alarm: of a law that is right, one run in a hundred does (docs/theory D.8). An
alarm says where the run's configuration differs from what all of the law's runs had in common.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from escala.contract import lines
from escala.contract.attempt import flatten
from escala.contract.fields import build
from escala.contract.records import AttemptFiles, AttemptSpec, Outcome, read_record
from escala.laws.forms import known_inputs
from escala.laws.intervals import resolves
from escala.laws.reference import Cache, Stored
from escala.tracking.spool import SpoolTracker

log = logging.getLogger("escala.drift")
LEVEL = 0.9  # of the interval whose coverage is counted
FALSE_ALARMS = 0.01  # of the runs of a law that is right
FINGERPRINTS = ("tokenizer_fingerprint", "evaluation_fingerprint")


@dataclass(frozen=True)
class Checked:
    """One run against one law. Losses in nats per token."""

    law: str  # name@version
    run_id: str
    name: str
    at: float  # Unix seconds
    compute_flops: float | None
    extrapolation: float  # the farthest input's factor beyond the data; 1 is inside
    predicted: float
    low: float  # at LEVEL
    high: float
    alarm_low: float  # at 1 - FALSE_ALARMS
    alarm_high: float
    obtained: float
    difference: dict[str, list[str]] | None = (
        None  # of an alarm: key -> [the law's, the run's]; None: not known
    )

    @property
    def inside(self) -> bool:
        """Within the interval at LEVEL."""
        return self.low <= self.obtained <= self.high

    @property
    def alarm(self) -> bool:
        """Outside the interval of the alarm."""
        return not self.alarm_low <= self.obtained <= self.alarm_high

    @property
    def error(self) -> float:
        """Relative: obtained / predicted - 1."""
        return self.obtained / self.predicted - 1


@dataclass(frozen=True)
class Calibration:
    """Past predictions together. `coverage_low`, `coverage_high`: 95 % Wilson interval of the true coverage."""

    checks: Sequence[Checked]
    coverage: float | None
    coverage_low: float | None
    coverage_high: float | None
    median_error: float | None  # relative, absolute value
    median_width: float | None  # of the interval, relative to the prediction
    alarms: int
    expected_alarms: float


def check(
    stored: Stored, record: Mapping[str, Any], run_id: str, config: Mapping[str, Any], at: float
) -> Checked | None:
    """The run against the law; None where they cannot be compared: the run did not succeed, is one of the law's own
    points, reads other text, or the law has no interval of the alarm's level or needs an input that the run lacks.
    """
    law, origin = stored.law, stored.provenance
    loss = record.get("held_out_loss_nats")
    same_text = all(origin.get(name) and origin[name] == record.get(name) for name in FINGERPRINTS)
    if record.get("status") != "succeeded" or loss is None or not same_text:
        return None
    if not resolves(len(law.replicates_BP), 1 - FALSE_ALARMS):
        return None
    if run_id in origin.get("run_ids", ()):
        return None
    known = known_inputs()
    point = {name: record.get(known[name].field) for name in law.inputs}
    if any(value is None for value in point.values()):
        return None
    numbers = {name: float(value) for name, value in point.items() if value is not None}
    usual, alarm = law.predict(LEVEL, **numbers), law.predict(1 - FALSE_ALARMS, **numbers)
    if usual.low_nats is None or usual.high_nats is None or alarm.low_nats is None or alarm.high_nats is None:
        return None
    outside = not alarm.low_nats <= loss <= alarm.high_nats
    return Checked(
        law=stored.reference,
        run_id=run_id,
        name=str(record.get("name", "")),
        at=at,
        compute_flops=record.get("compute_flops"),
        extrapolation=usual.farthest,
        predicted=usual.loss_nats,
        low=usual.low_nats,
        high=usual.high_nats,
        alarm_low=alarm.low_nats,
        alarm_high=alarm.high_nats,
        obtained=float(loss),
        difference=difference(origin.get("configuration"), config) if outside else None,
    )


def difference(common: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, list[str]] | None:
    """Where a configuration leaves what all of a law's runs had in common; None where that was not kept."""
    if common is None:
        return None
    theirs, ours = flatten(common), flatten(config)
    keys = [key for key in theirs if key != "training.seed" and ours.get(key) != theirs[key]]
    return {key: [theirs[key], ours.get(key, "-")] for key in keys}


def calibration(checks: Sequence[Checked]) -> Calibration:
    """Coverage, errors and alarms of past predictions."""
    n, inside = len(checks), sum(c.inside for c in checks)
    low, high = wilson(inside, n) if n else (None, None)
    return Calibration(
        checks=checks,
        coverage=inside / n if n else None,
        coverage_low=low,
        coverage_high=high,
        median_error=median(abs(c.error) for c in checks) if n else None,
        median_width=median((c.high - c.low) / c.predicted for c in checks) if n else None,
        alarms=sum(c.alarm for c in checks),
        expected_alarms=FALSE_ALARMS * n,
    )


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    from scipy.stats import binomtest  # a second of imports, for a calibration alone

    found = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


# Files


class Predictions:
    """HOME/laws/predictions.jsonl: every comparison, a line each."""

    def __init__(self, home: Path) -> None:
        self._path = home / "laws" / "predictions.jsonl"

    def read(self) -> list[Checked]:
        """All of them, oldest first; a run and a law that met twice count once."""
        found = []
        for row in lines.objects(self._path):
            with suppress(ValueError):  # a damaged line costs itself
                found.append(build(Checked, row))
        return list({(c.law, c.run_id): c for c in found}.values())

    def append(self, checks: Iterable[Checked]) -> None:
        """Add comparisons, in one write."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = b"".join(json.dumps(asdict(c), separators=(",", ":")).encode() + b"\n" for c in checks)
        lines.append(self._path, text)


def compare_run(home: Path, tracker: str, directory: Path) -> bool:
    """Compare the run of an attempt that has ended with every champion, once; true where its spool got tags.

    A search's trials are left out: most of them are badly tuned on purpose.
    """
    files = AttemptFiles(directory)
    spec, outcome = read_record(AttemptSpec, files.spec), read_record(Outcome, files.outcome)
    if spec is None or outcome is None or not outcome.record or spec.tags.get("escala.aim") == "search":
        return False
    try:
        run_id = (files.spool / "run_id").read_text().strip()
    except FileNotFoundError:  # its run is not in the tracker: nothing was told, or a person has deleted it
        return False
    predictions = Predictions(home)
    known = {(c.law, c.run_id) for c in predictions.read()}
    champions = [s for s in Cache(home, tracker).champions() if (s.reference, run_id) not in known]
    found = [check(s, outcome.record, run_id, spec.config, time.time()) for s in champions]
    checks = [c for c in found if c is not None]
    if not checks:
        return False
    SpoolTracker(files.spool, holds=False).tags(
        run_id, {f"escala.law.{c.law.split('@')[0]}": _told(c) for c in checks}
    )
    predictions.append(checks)
    for each in checks:
        if each.alarm:
            log.warning("drift: run %s: %s", run_id, _told(each))
    return True


def _told(each: Checked) -> str:
    """The comparison in a line, for the run's tag and the log."""
    verdict = "ALARM" if each.alarm else "inside" if each.inside else "outside"
    text = (
        f"{verdict}: {each.law} predicted {each.predicted:.4f} ({LEVEL:.0%} from {each.low:.4f} to {each.high:.4f}), "
        f"obtained {each.obtained:.4f}"
    )
    if not each.alarm:
        return text
    if each.difference is None:
        return f"{text}; the law keeps no configuration to compare with"
    changes = ", ".join(f"{key}: {theirs} -> {ours}" for key, (theirs, ours) in each.difference.items())
    return f"{text}; configuration: {changes or 'as in all of its runs'}"
