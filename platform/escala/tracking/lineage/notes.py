"""The Markdown note of a run, which MLflow shows at the top of its page: what ran, what came of it, how to go on.

Pure functions of records. MLflow renders a note's tables and code; what people named (jobs, paths) is quoted as code.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from escala.contract.records import AttemptSpec, RunRecord
from escala.contract.redaction import hide_arguments
from escala.schema.workloads import WORKLOADS

NOTE_TAG = "mlflow.note.content"  # MLflow's own
COMMAND_TAG = "escala.command"  # what was typed, passwords left out
TRIAL_TAG, SWEEP_TAG = "escala.trial", "escala.sweep"
NOTE_CHARACTERS = 7900  # MLflow's limit of a tag is 8,000


def run_note(
    spec: AttemptSpec,
    record: RunRecord | None = None,
    rows: Sequence[tuple[str, str]] = (),
    hint: str = "",
    checkpoint: str | None = None,
) -> str:
    """The note of an attempt: while it runs (without `record`), and when it has ended.

    Args:
        rows: more facts, by name.
        hint: how to fix what went wrong.
        checkpoint: the last good one.
    """
    status = "running" if record is None else record.status
    loss = None if record is None else record.held_out_loss_nats
    ended = _join(_text(status.replace("_", " ")), _number(loss, "nats per token on held-out text"))
    title = f"**{_text(spec.workload)} {_code(spec.name)}**: {ended}"
    reason = record.reason if record is not None else None
    said = [f"> {_text(reason)}" if reason else "", f"> {_text(hint)}" if hint else ""]
    facts = [*_about(spec), *rows, *(_came_of(record) if record is not None else ())]
    if checkpoint:
        facts.append(("last checkpoint", _code(checkpoint)))
    command = spec.tags.get(COMMAND_TAG)
    parts = [
        title,
        "\n>\n".join(line for line in said if line),
        table(("", ""), facts),
        f"Started by\n\n{fenced(command)}" if command and TRIAL_TAG not in spec.tags else "",
        "How to go on\n\n" + fenced("\n".join(next_commands(spec, status, checkpoint))),
    ]
    return "\n\n".join(part for part in parts if part)[:NOTE_CHARACTERS]


def start_tags(spec: AttemptSpec) -> dict[str, str]:
    """What MLflow's pages show of a run from its start: the note, and what is run."""
    known = WORKLOADS.get(spec.workload)
    command = known.started_by if known else f"escala submit {spec.workload}"
    return {NOTE_TAG: run_note(spec), "mlflow.source.type": "LOCAL", "mlflow.source.name": command}


def command_tag(command: Sequence[str]) -> dict[str, str]:
    """What was typed, as a run's tag, passwords left out; nothing where it was no command of escala's (a notebook)."""
    if not command or "escala" not in PurePath(command[0]).parts:
        return {}
    return {COMMAND_TAG: shlex.join(["escala", *hide_arguments(command[1:])])[: NOTE_CHARACTERS // 2]}


def next_commands(spec: AttemptSpec, status: str, checkpoint: str | None) -> list[str]:
    """What to type about a run, with a comment each."""
    job = spec.job_id
    if TRIAL_TAG in spec.tags:
        return [f"escala jobs show {job}   # its sweep", f"escala laws fit --sweep {job} --name NAME"]
    if status == "running":
        return [f"escala logs -f {job}", f"escala stop {job}   # with a checkpoint"]
    found = [f"escala jobs show {job}", f"escala logs {job}"]
    known = WORKLOADS.get(spec.workload)
    if known is not None and known.result == "points":
        found.append(f"escala laws fit --sweep {job} --name NAME   # a law of its points")
    elif checkpoint:
        found.append(f"escala export {job} --to DIRECTORY   # for transformers and vLLM")
        found.append(f"escala jobs resume {job} --set training.steps=STEPS   # a new job from its checkpoint")
    if status != "succeeded":
        found.append(f"escala jobs retry {job}   # the same job again, from its last checkpoint")
    return found


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; nothing without rows."""
    if not rows:
        return ""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def fenced(text: str) -> str:
    """A block of code."""
    return f"```\n{text.replace('```', '``')}\n```"


def _about(spec: AttemptSpec) -> list[tuple[str, str]]:
    attempt = "" if spec.attempt == 1 else f", attempt {spec.attempt}"
    found = [("job", f"{_code(spec.job_id)}{attempt}")]
    if TRIAL_TAG in spec.tags:
        found = [("trial", f"of the sweep {_code(spec.tags.get(SWEEP_TAG, ''))}, job {_code(spec.job_id)}")]
    model = spec.config.get("model")
    if isinstance(model, dict) and "n_layers" in model:
        found.append(("model", _model(model)))
    start = spec.config.get("start")
    if isinstance(start, dict) and start.get("path"):
        found.append(("starts from", _code(str(start.get("job") or start["path"]))))
    return found


def _model(model: Mapping[str, Any]) -> str:
    moe = model.get("moe")
    parts = [f"{model['n_layers']} layers of width {model.get('d_model')}, {model.get('n_heads')} heads"]
    if isinstance(moe, dict):
        parts.append(f"{moe.get('experts')} experts of which {moe.get('chosen')} are chosen")
    return ", ".join([*parts, f"vocabulary {model.get('vocab_size')}"])


def _came_of(record: RunRecord) -> list[tuple[str, str]]:
    """What a record says, where it says something."""
    active = record.n_active if record.n_active != record.n_total else None
    trained = record.n_trained if record.n_trained != record.n_total else None
    found = [
        ("parameters", _join(_count(record.n_total), _count(active, "active"), _count(trained, "trained"))),
        ("tokens", _count(record.train_tokens)),
        (
            "held-out loss",
            _join(
                _number(record.held_out_loss_nats, "nats per token"),
                _number(record.held_out_bits_per_byte, "bits per byte"),
                _number(record.initial_held_out_loss_nats, "nats before the first step"),
            ),
        ),
        ("training loss", _number(record.train_loss_nats, "nats per token")),
        *((name.replace("_", " "), _number(value)) for name, value in (record.measures or {}).items()),
        (
            "compute",
            _join(
                _number(record.compute_flops, "FLOPs"),
                _number(record.tokens_per_second, "tokens per second"),
                _percent(record.model_flops_utilization, "of peak"),
            ),
        ),
        ("time", _join(_number(record.wall_seconds, "s"), _count(record.workers, "workers"))),
        ("cost", _number(record.cost_usd, "USD")),
        (
            "energy",
            _join(
                _number(record.energy_joules, "J"),
                _number(record.carbon_gco2e, "g CO2e"),
                _text(record.energy_source or "") if record.energy_joules is not None else "",
            ),
        ),
        ("memory", _number(record.peak_memory_bytes and record.peak_memory_bytes / 2**20, "MiB at most")),
    ]
    return [(name, value) for name, value in found if value]


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _count(value: int | None, unit: str = "") -> str:
    return "" if value is None else f"{value:,} {unit}".strip()


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.4g} {unit}".strip()


def _percent(value: float | None, unit: str) -> str:
    return "" if value is None else f"{100 * value:.1f} % {unit}"


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', '')}`"


def _text(text: str) -> str:
    """Words of ours or of an error, of which Markdown is to make nothing."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|~" else c for c in _line(text))


def _line(text: str) -> str:
    return " ".join(text.split())[:1000]
