"""With its neighbours render_*.py the only module that prints: tables for people, `--json` for programs, errors to
stderr.
"""

from __future__ import annotations

import json as jsonlib
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from escala.contract.errors import EscalaError
from escala.contract.redaction import hide, hide_in
from escala.tracking.pages import table_beside

if TYPE_CHECKING:
    from escala.views.cluster import ClusterView, GarbageView
    from escala.views.jobs import AttemptView, EventView, JobDetailsView, JobView
    from escala.views.run_records import RunDetailsView, RunView, SampleView

REWARD_HEAD = "reward_head.safetensors"  # beside an exported reward model's trunk
GGUF = "model.gguf"  # the same
PIPE_WIDTH = 200  # a table for `grep` or a file is not folded to a terminal's width
_out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err_console = Console(stderr=True, highlight=False, soft_wrap=True)


def is_terminal() -> bool:
    """Whether stderr is one, where progress is shown."""
    return err_console.is_terminal


def error(failure: EscalaError) -> None:
    """What and why, then how to fix it."""
    err_console.print(f"[bold red]error:[/] {escape(failure.message)}")
    if failure.hint:
        err_console.print(f"[bold]hint:[/] {escape(failure.hint)}")


def note(text: str) -> None:
    """A line about what is going on; on stderr, so that stdout stays the answer."""
    err_console.print(f"[dim]{escape(hide(text))}[/]")


def warning(text: str) -> None:
    """What went wrong beside the answer, which stands; on stderr, with `--json` too."""
    err_console.print(f"[bold yellow]warning:[/] {escape(hide(text))}")


def raw(text: str) -> None:
    """A line as it is."""
    _out.print(hide(text), markup=False)


def as_json(value: Any) -> None:
    """A view, or several, or plain data, as one JSON document; a number that JSON has no text for (NaN, an infinity)
    is null.
    """
    shown = _finite(hide_in(_plain(value)))
    print(jsonlib.dumps(shown, indent=1, default=lambda other: hide(str(other)), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.model_dump() if hasattr(value, "model_dump") else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def cluster(status: ClusterView, json: bool) -> None:
    """The processes of the cluster, a row each."""
    if json:
        as_json(status)
        return
    rows = [(p.name, p.state, p.pid, p.address, p.log) for p in status.processes]
    table(("process", "state", "pid", "address", "log"), rows)
    if status.runs_page:
        raw(f"runs: {status.runs_page}")
    for text in status.notes:
        note(text)


def submitted(view: JobView, json: bool) -> None:
    """One line about a job, and what to type next."""
    if json:
        as_json(view)
        return
    raw(f"{view.id}  {view.name}  {view.state}" + (f" ({view.reason})" if view.reason else ""))
    if view.state in ("queued", "starting", "running"):
        note(f"next: escala logs -f {view.id}, or escala jobs show {view.id}")


def ended(view: JobView, json: bool = False) -> None:
    """How a job that was followed ended, with the whole reason. With `json` stdout stays one document."""
    if not json:
        submitted(view, False)
    if view.state == "failed":
        _reason(view, err_console)


def jobs(views: Sequence[JobView], json: bool) -> None:
    """Jobs, a row each; under them why some failed."""
    if json:
        as_json(views)
        return
    rows = [
        (v.id, v.name, v.workload, v.state, v.reason, v.priority, v.attempts, ago(v.submitted_at))
        for v in views
    ]
    table(("job", "name", "workload", "state", "reason", "priority", "attempts", "submitted"), rows)
    for view in views:
        if view.state == "failed":
            _reason(view, _out, f"{view.id} ")


def _reason(view: JobView, console: Console, subject: str = "") -> None:
    """Why a job failed, under the table, which would cut it, and the hint."""
    console.print(
        f"[bold red]{subject}failed:[/] {escape(hide(view.message or view.reason or 'no reason was given'))}"
    )
    if view.hint:
        console.print(f"[bold]hint:[/] {escape(hide(view.hint))}")


def job(details: JobDetailsView, json: bool) -> None:
    """A job in full."""
    if json:
        as_json(details)
        return
    hidden = {"config", "spec_hash"} | ({"idempotency_key"} if details.job.has_own_key else set())
    shown = {k: v for k, v in details.job.model_dump().items() if k not in hidden}
    pairs({k: v for k, v in shown.items() if v not in (None, "", {}, ())})
    raw("\ntotals over the attempts")
    pairs(details.totals.model_dump())
    raw("")
    table(
        ("attempt", "ended as", "run", "step", "loss", "time"),
        [_attempt_row(a, run) for a, run in zip(details.attempts, details.runs, strict=True)],
    )
    for attempt in details.attempts:
        if attempt.checkpoint:
            raw(f"attempt {attempt.number} left the checkpoint {attempt.checkpoint}")
    raw("\nhistory")
    for event in details.events:
        raw(_event(event))


def _attempt_row(attempt: AttemptView, run: str | None) -> tuple[Any, ...]:
    progress = attempt.progress or {}
    loss, seconds = number(progress.get("loss_nats")), value("wall_seconds", attempt.wall_seconds)
    return attempt.number, attempt.outcome, run, number(progress.get("step")), loss, seconds


def _event(event: EventView) -> str:
    attempt = f"attempt {event.attempt}" if event.attempt else ""
    why = " ".join(filter(None, (event.reason, event.message)))
    return f"  {moment(event.at)}  {attempt:<11}  {event.state:<9}  {why}".rstrip()


def runs(records: Sequence[RunView], json: bool) -> None:
    """Runs, a row each; `--json` gives every field."""
    if json:
        as_json(records)
        return
    columns = ("run", "job", "name", "status", "held-out loss", "tokens", "N", "FLOPs", "time")
    rows = [
        (
            (r.run_id or "")[:8],
            f"{r.job_id}-{r.attempt}",
            r.name,
            r.status,
            number(r.held_out_loss_nats),
            number(r.train_tokens),
            number(r.n_total),
            number(r.compute_flops),
            value("wall_seconds", r.wall_seconds),
        )
        for r in records
    ]
    table(columns, rows)
    for r in records:
        if r.reason and r.status not in ("succeeded", "user", "budget"):
            raw(f"{r.job_id}-{r.attempt} {r.status}: {r.reason}")


def run(record: RunDetailsView, json: bool) -> None:
    """One run's record."""
    if json:
        as_json(record)
        return
    pairs({k: v for k, v in record.model_dump().items() if v is not None and k != "url"})
    page(record.url, "\n")


def page(url: str | None, before: str = "in MLflow       ") -> None:
    """A run's page, and the table in which it stands; nothing where the tracker has no pages."""
    if url is None:
        return
    raw(f"{before}{url}")
    raw(f"{'all runs':<{len(before)}}{table_beside(url)}" if before.strip() else table_beside(url))


def comparison(values: Mapping[str, Sequence[Any]], json: bool) -> None:
    """Rows: what differs; columns: runs. The first row names the runs."""
    if json:
        as_json(values)
        return
    names = [str(n) for n in values["run_id"]]
    table(
        ("", *names),
        [(key, *(value(key, each) for each in row)) for key, row in values.items() if key != "run_id"],
    )


def samples(rows: Sequence[SampleView], json: bool) -> None:
    """A policy's responses with their rewards, a row each."""
    if json:
        as_json(rows)
        return
    columns = ("iteration", "reward", "prompt", "response")
    table(
        columns, [(row.iteration, number(row.reward), repr(row.prompt), repr(row.response)) for row in rows]
    )


def exported(directory: Path, adapter: bool) -> None:
    """Where an export lies, and how it is opened."""
    raw(f"{directory}")
    name = repr(str(directory))
    if (directory / REWARD_HEAD).is_file():
        note(
            f"a reward model: workloads.rewards.reward_model.load_reward_model(pathlib.Path({name})) opens it,"
        )
        note(f"and `rewards: [{{kind: model, model: {name}}}]` uses it; transformers opens its trunk alone")
        return
    if (directory / GGUF).is_file():
        note(
            f"llama.cpp opens it, and transformers: AutoModelForCausalLM.from_pretrained({name}, gguf_file={GGUF!r})"
        )
        return
    opens = f"peft.PeftModel.from_pretrained(base, {name})"
    note(f"opens with {opens if adapter else f'transformers.AutoModelForCausalLM.from_pretrained({name})'}")


def garbage(found: GarbageView, json: bool) -> None:
    """Checkpoints that the retention rule gives up, and their size."""
    if json:
        as_json(found)
        return
    table(("checkpoint", "MB"), [(each.path, f"{each.size_bytes / 1e6:.1f}") for each in found.checkpoints])
    total = sum(each.size_bytes for each in found.checkpoints) / 1e6
    raw(f"{total:.1f} MB {'freed' if found.deleted else 'could be freed: escala gc --delete'}")
    for reason in found.damaged:
        note(f"left alone: {reason}; delete it yourself when you do not need it")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows under their headings; an empty cell for None."""
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*("" if cell is None else escape(hide(str(cell))) for cell in row))
    _out.print(grid)


def pairs(values: Mapping[str, Any]) -> None:
    """A name and its value a line; the name says whether it is a time or a duration."""
    width = max((len(k) for k in values), default=0)
    for key, each in values.items():
        raw(f"  {key:<{width}}  {value(key, each)}")


def value(name: str, given: Any) -> str:
    """What is called `name`, for people: `..._at` is a moment, `..._seconds` a duration, all else a `number`."""
    if isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given):
        if name.endswith("_at"):
            return moment(given)
        if name.endswith("_seconds") or name == "seconds":
            return duration(given)
    return number(given)


def number(value: Any) -> str:
    """A number for people, everywhere the same: floats to four digits below one and five above, thousands separated,
    a power of ten from a million on and below a thousandth; counts whole.
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        if value == 0 or not math.isfinite(value):
            return f"{value:g}"
        if not 1e-3 <= abs(value) < 999_995:
            return f"{value:.4g}"
        digits = 5 if abs(value) >= 1 else 4
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{float(f'{value:.{digits}g}'):,.{decimals}f}"
        return text.rstrip("0").rstrip(".") if decimals else text
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def duration(seconds: float) -> str:
    """How long: "0.25 s", "42 s", "12 min 05 s", "1 h 02 min", "3 d 04 h"."""
    if seconds < 0 or not math.isfinite(seconds):
        return number(float(seconds))
    if seconds < 9.95:
        return f"{float(f'{seconds:.2g}'):g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def moment(at: float) -> str:
    """A Unix time where we are: "2026-03-01 14:05:09 +0100". One that no calendar has stays a number."""
    try:
        return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    except (OverflowError, OSError, ValueError):
        return number(at)


def ago(at: float | None) -> str:
    """How long since a Unix time."""
    return "" if at is None else f"{duration(max(0.0, round(time.time() - at)))} ago"


def step(text: str) -> None:
    """The heading of one part of a longer story."""
    _out.print(f"\n[bold]{escape(text)}[/]")
