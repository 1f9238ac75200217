"""Tables that other tools write: runs of Weights & Biases and of MLflow, trainer_state.json of Hugging Face.

Such a table is known by its columns. Names are matched without their section (config., summary., params., metrics.) and
unit. Where two columns could mean the same, neither is taken: the error asks for --map. What was taken is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from escala.contract.errors import LawError
from escala.laws import scales
from escala.laws.cells import is_missing
from escala.laws.forms import known_inputs

LOSS = "loss_nats"
SECTION = re.compile(r"(config|summary|params|metrics|tags|data\.params|data\.metrics)\.", re.IGNORECASE)
PANEL = re.compile(r".+ - .+?(__MIN|__MAX)?")  # of a chart of wandb: RUN - METRIC, with its extremes
AXES = ("step", "_step", "relative time (process)", "relative time (wall)", "wall time")
ALIASES = {
    "n_active": ("params", "n_params", "num_params", "parameters", "num_parameters", "model_params"),
    "tokens": (
        "train_tokens",
        "n_tokens",
        "num_tokens",
        "tokens_seen",
        "num_input_tokens_seen",
        "total_tokens",
    ),
    "compute_flops": ("flops", "train_flops", "total_flops"),
    LOSS: (
        "eval_loss",
        "val_loss",
        "valid_loss",
        "validation_loss",
        "test_loss",
        "held_out_loss",
        "heldout_loss",
    ),
}  # not "loss": it may be that of the training
DENSE = "n_active"


@dataclass(frozen=True)
class Export:
    """What was recognised. `mapping`: {column: column of a law's points}; `reasons`: why a row is no point, or None."""

    kind: str
    mapping: dict[str, str]
    reasons: list[str | None]
    run_column: str | None  # names the run of each row
    assumed: list[str] = field(default_factory=list)


def recognised(
    names: Sequence[str], columns: Sequence[Sequence[Any]], rename: Mapping[str, str]
) -> Export | None:
    """The export that a table is; None for any other table.

    Raises LawError for a chart of wandb, which has no parameters and no tokens, and where two columns compete.
    """
    table = dict(zip(names, columns, strict=True))
    others = [name for name in names if name.lower() not in AXES]
    charts = [name for name in others if PANEL.fullmatch(name)]
    if charts and charts == others:
        raise LawError(
            f"This is the export of a chart of wandb ({charts[0]}): it has neither parameters nor tokens.",
            "Export the table of runs: Runs, then Download as CSV, with the columns of the loss, size and tokens.",
        )
    if {"Name", "State"} <= set(names):
        kind, status, done, run = "wandb runs", "State", "finished", "Name"
    elif {"run_id", "status"} <= set(names) and any(SECTION.match(name) for name in names):
        kind, status, done, run = "MLflow runs", "status", "FINISHED", "run_id"
    else:
        return None
    reasons = [_reason(value, status, done) for value in table[status]]
    mapping = _mapping(names, rename)
    said = [
        f"a dense model: {name} is {DENSE}" for name, new in mapping.items() if new == DENSE != _bare(name)
    ]
    return Export(kind, mapping, reasons, run, said)


def _reason(value: Any, status: str, done: str) -> str | None:
    if value == done:
        return None
    return f"the run is not finished ({status} is {'empty' if is_missing(value) else value})"


def _mapping(names: Sequence[str], rename: Mapping[str, str]) -> dict[str, str]:
    """The columns that are clear besides those that --map names."""
    found = dict[str, str]()
    for new in (*known_inputs(), LOSS):
        if new in rename.values() or new in names:
            continue
        known = {new, *ALIASES.get(new, ())}
        fitting = [name for name in names if name not in rename and _bare(name) in known]
        if len(fitting) > 1:
            raise LawError(
                f"{' and '.join(fitting)} could each be {new}; which is meant is not clear.",
                f"Say it: --map '{fitting[0]}={new}'.",
            )
        found |= dict.fromkeys(fitting, new)
    return found


def _bare(name: str) -> str:
    """A column's name without section and unit, in lower case: summary.eval/loss -> eval_loss."""
    without = SECTION.sub("", scales.without_unit(name), count=1)
    return re.sub(r"[\s/.\-]+", "_", without.strip()).lower()


def trainer_state(plain: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The evaluations in a trainer_state.json, a record each: loss_nats, tokens (where they were counted), step, epoch.

    Raises LawError where there is none.
    """
    history = plain.get("log_history")
    entries = [entry for entry in history if isinstance(entry, Mapping)] if isinstance(history, list) else []
    tokens = {e.get("step"): e["num_input_tokens_seen"] for e in entries if e.get("num_input_tokens_seen")}
    rows = [
        {
            LOSS: entry["eval_loss"],
            "step": entry.get("step"),
            "epoch": entry.get("epoch"),
            "tokens": tokens.get(entry.get("step")),
        }
        for entry in entries
        if "eval_loss" in entry
    ]
    if not rows:
        raise LawError(
            f"{where}: the log_history has no eval_loss.",
            "Train with eval_strategy='steps', or give a table of runs.",
        )
    if all(row["tokens"] is None for row in rows):  # a column that --points FILE::tokens=... may fill
        rows = [{key: value for key, value in row.items() if key != "tokens"} for row in rows]
    return rows


def flattened(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run as MLflow's JSON has it ({"info": ..., "data": ...}) with the names of its CSV."""
    info, data = record.get("info", {}), record.get("data", {})
    found: dict[str, Any] = {"run_id": info.get("run_id"), "status": info.get("status")}
    for section in ("params", "metrics"):
        values = data.get(section) or {}
        pairs = (
            values.items()
            if isinstance(values, Mapping)
            else ((each["key"], each["value"]) for each in values)
        )
        found |= {f"{section}.{key}": value for key, value in pairs}
    return found
