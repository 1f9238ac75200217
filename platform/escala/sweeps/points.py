"""What a sweep measured: its trials as points of a law; those that are none keep the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala.contract.records import AttemptFiles, Outcome, TrialFiles, read_record
from escala.laws.audit import AuditedPoint, AuditedRun, audit
from escala.laws.files import ATTENTION, REFUSAL
from escala.laws.provenance import in_common
from escala.schema import ModelConfig
from escala.schema.workloads import HELD_OUT_LOSS, WORKLOADS, Measure, objective_of
from escala.sweeps.design import SEED
from escala.sweeps.trials import PlannedTrial, last_outcome, read_planned

if TYPE_CHECKING:
    import pandas as pd

AUDIT_REASON = "of the audit: its learning rate or its length is not the recipe's"
RECORD = {  # column -> field of the RunRecord
    "loss_nats": "held_out_loss_nats",
    "n_total": "n_total",
    "n_active": "n_active",
    "n_non_embedding": "n_non_embedding",
    "tokens": "train_tokens",
    "context_tokens": "context_tokens",
    "compute_flops": "compute_flops",
    "energy_joules": "energy_joules",
    "seed": "seed",
    "wall_seconds": "wall_seconds",
    "tokenizer_fingerprint": "tokenizer_fingerprint",
    "evaluation_fingerprint": "evaluation_fingerprint",
}


@dataclass(frozen=True)
class SweepPoints:
    """`points` and `refused` (with `reason`; in the column REFUSAL, too, for `fit_law` of both), a row a trial: the
    columns of `fit_law`, the trial, and what was varied; where trials are judged by another measure than a loss, its
    columns (of PPO `reward` and `kl_nats`). `measure`: what trials are judged by.
    `noise`: pooled relative standard deviation of the loss between seeds; None without repeats.
    `configuration`: what has one value in all points, nested.
    """

    points: pd.DataFrame
    refused: pd.DataFrame
    noise: float | None
    configuration: dict[str, Any]
    measure: Measure = HELD_OUT_LOSS
    audited: tuple[AuditedPoint, ...] = ()  # of the recipe, with `audit`

    def summary(self) -> list[tuple[str, str]]:
        """How many points there are, the best of them, and why the first trial was refused: for people."""
        rows = [("points", f"{len(self.points)}, and {len(self.refused)} refused")]
        aim = self.measure.column
        if aim in self.points and len(found := self.points.dropna(subset=[aim])):
            best = found.sort_values(aim, ascending=not self.measure.higher_is_better).iloc[0]
            rows.append(("best", f"{aim} {best[aim]:.4g} (`{best['name']}`)"))
        if len(self.refused):
            first = self.refused.iloc[0]
            rows.append(("refused, for example", f"`{first['name']}`: {first['reason'][:300]}"))
        return rows


def read_points(home: Path, job_id: str) -> SweepPoints:
    """The points of a sweep, from its trials' files: a sweep that runs has those that are there."""
    import pandas as pd

    planned = read_planned(home, job_id)
    outcomes = [last_outcome(TrialFiles(home, p.fingerprint)) for p in planned]
    rows = [_row(p, TrialFiles(home, p.fingerprint), o) for p, o in zip(planned, outcomes, strict=True)]
    measure = next((objective_of(o.record) for o in outcomes if o is not None and o.record), HELD_OUT_LOSS)
    audited = audit(_audited_runs(rows))
    for row in rows:
        if row.pop("audit") is not None and row["reason"] is None:
            row["reason"] = AUDIT_REASON
    table = pd.DataFrame([row for row in rows if row["reason"] is None]).drop(
        columns="reason", errors="ignore"
    )
    refused = pd.DataFrame([{**row, REFUSAL: row["reason"]} for row in rows if row["reason"] is not None])
    used = [p.trial.config for p, row in zip(planned, rows, strict=True) if row["reason"] is None]
    return SweepPoints(table, refused, _noise(table, planned), in_common(used), measure, tuple(audited))


def _audited_runs(rows: Sequence[Mapping[str, Any]]) -> list[AuditedRun]:
    """The runs of the audit, and the sweep's own points at the same N, D: factor 1."""
    told = [row for row in rows if row["reason"] is None and row["loss_nats"] is not None]
    places = {(row["n_active"], row["tokens"]) for row in told if row["audit"] is not None}
    found: dict[tuple[float, float, float], AuditedRun] = {}
    for row in told:
        place, factor = (float(row["n_active"]), float(row["tokens"])), float(row["audit"] or 1.0)
        if place in places:
            run = AuditedRun(*place, factor, row["learning_rate"], row["loss_nats"], row["run_id"])
            found.setdefault((*place, factor), run)  # of several seeds the first
    return list(found.values())


def _row(planned: PlannedTrial, files: TrialFiles, outcome: Outcome | None) -> dict[str, Any]:
    trial = planned.trial
    attempts = files.attempts()
    record: Mapping[str, Any] = (outcome.record if outcome else None) or {}
    training = trial.config["training"]
    row: dict[str, Any] = {column: record.get(name) for column, name in RECORD.items()}
    row |= {  # what was planned, where the run did not get so far as to say it
        "n_total": trial.n_total,
        "n_active": trial.n_active,
        "learning_rate": training["optimizer"]["learning_rate"],
        "batch_tokens": training["batch_sequences"] * trial.context_tokens,
        **_experts(trial.config["model"]),
        ATTENTION: ModelConfig.model_validate(trial.config["model"]).attention_words,
        "audit": trial.audits,
        "trial": planned.fingerprint,
        **_branch(planned, attempts),
        "name": planned.name,
        "run_id": _run_id(attempts[-1].spool / "run_id") if attempts else None,
        "reason": _refusal(outcome, record, trial.train_tokens, bool(attempts)),
    }
    measures = record.get("measures") or {}
    row |= {key: measures[key] for key in objective_of(record).columns if key in measures}
    return row | {key: value for key, value in trial.values.items() if key not in row and key != SEED}


def _branch(planned: PlannedTrial, attempts: list[AttemptFiles]) -> dict[str, Any]:
    """Of a branch, what it shares, by which a law's bootstrap resamples it, and what its attempts have spent; nothing
    of a trial that was trained alone.
    """
    if planned.trunk is None:
        return {}
    ended = (read_record(Outcome, each.outcome) for each in attempts)
    spent = [each.record.get("attempt_flops") or 0.0 for each in ended if each is not None and each.record]
    return {"trunk": planned.trunk, "spent_flops": sum(spent)}


def _experts(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a law of mixtures asks for; nothing of a dense model, and no capacity factor where nothing is dropped."""
    moe = model.get("moe")
    factor = None if moe is None else moe["capacity_factor"]
    return {} if factor is None else {"capacity_factor": factor}


def _refusal(
    outcome: Outcome | None, record: Mapping[str, Any], train_tokens: int, started: bool
) -> str | None:
    """Why the trial gives no point; None where it does."""
    if not started:
        return "not started"
    if outcome is None:
        return "unfinished: it has no outcome"
    if outcome.kind != "succeeded":
        return f"{outcome.kind}: {outcome.message}"
    measure = objective_of(record)
    if measure.read(record) is None:
        return f"it has no {measure.label}"
    workload = WORKLOADS.get(str(record.get("workload")))
    if workload is not None and not workload.fixed_tokens:
        return None
    if record.get("train_tokens") != train_tokens:
        return f"unfinished: {record.get('train_tokens')} of {train_tokens} tokens"
    return None


def _run_id(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def _noise(table: pd.DataFrame, planned: list[PlannedTrial]) -> float | None:
    import numpy as np

    if table.empty or table["loss_nats"].isna().any():
        return None
    values = {
        p.fingerprint: repr(sorted((k, v) for k, v in p.trial.values.items() if k != SEED)) for p in planned
    }
    squares, freedom = 0.0, 0
    for _, losses in table.assign(point=table["trial"].map(values)).groupby("point")["loss_nats"]:
        logs = np.log(losses.to_numpy(float))
        squares, freedom = squares + float(((logs - logs.mean()) ** 2).sum()), freedom + len(logs) - 1
    return (squares / freedom) ** 0.5 if freedom else None
