"""With its neighbours render_*.py the only module that prints: tables for people, `--json` for programs, errors to
stderr.
"""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from escala.errors import EscalaError
from escala.records import Progress, RunRecord
from escala.tracking.pages import table_beside

if TYPE_CHECKING:
    from escala.api import Garbage, JobDetails, Watched
    from escala.cluster import ClusterStatus
    from escala.jobs.model import Attempt, HistoryEvent, Job

PIPE_WIDTH = 200  # a table for `grep` or a file is not folded to a terminal's width
_out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def error(failure: EscalaError) -> None:
    """What and why, then the mend."""
    _err.print(f"[bold red]error:[/] {escape(failure.message)}")
    if failure.hint:
        _err.print(f"[bold]hint:[/] {escape(failure.hint)}")


def note(text: str) -> None:
    """A line about what is going on; on stderr, so that stdout stays the answer."""
    _err.print(f"[dim]{escape(text)}[/]")


def quiet(text: str) -> None:
    """A reporter that says nothing, for --json."""


def raw(text: str) -> None:
    """A line as it is."""
    _out.print(text, markup=False)


def as_json(value: Any) -> None:
    """One JSON document."""
    print(jsonlib.dumps(value, indent=1, default=str))


def cluster(status: ClusterStatus, json: bool) -> None:
    """The processes of the cluster, a row each."""
    if json:
        as_json(asdict(status))
        return
    rows = [(p.name, p.state, p.pid, p.address, p.log) for p in status.processes]
    table(("process", "state", "pid", "address", "log"), rows)
    if status.runs_page:
        raw(f"runs: {status.runs_page}")
    for text in status.notes:
        note(text)


def submitted(view: Job, json: bool) -> None:
    """One line about a job, and what to type next."""
    if json:
        as_json(asdict(view))
        return
    raw(f"{view.id}  {view.name}  {view.state}" + (f" ({view.reason})" if view.reason else ""))
    if view.state in ("queued", "starting", "running"):
        note(f"next: escala logs -f {view.id}, or escala jobs show {view.id}")


def jobs(views: Sequence[Job], json: bool) -> None:
    """Jobs, a row each."""
    if json:
        as_json([asdict(v) for v in views])
        return
    rows = [
        (v.id, v.name, v.workload, v.state, v.reason, v.priority, v.attempts, ago(v.submitted_at))
        for v in views
    ]
    table(("job", "name", "workload", "state", "reason", "priority", "attempts", "submitted"), rows)
    if not views:
        note("no jobs wait or run; `escala ps --all` shows finished ones")


def job(details: JobDetails, json: bool) -> None:
    """A job in full."""
    if json:
        as_json(asdict(details))
        return
    pairs({k: v for k, v in asdict(details.job).items() if k != "config" and v is not None})
    raw("\ntotals over the attempts")
    pairs(asdict(details.totals))
    raw("")
    table(
        ("attempt", "ended as", "run", "step", "loss", "seconds", "checkpoint"),
        [_attempt_row(a, run) for a, run in zip(details.attempts, details.runs, strict=True)],
    )
    raw("")
    table(("when", "attempt", "state", "why"), [_event_row(e) for e in details.events])


def _attempt_row(attempt: Attempt, run: str | None) -> tuple[Any, ...]:
    progress = attempt.progress or {}
    loss, seconds = number(progress.get("loss_nats")), number(attempt.wall_seconds)
    return attempt.number, attempt.outcome, run, progress.get("step"), loss, seconds, attempt.checkpoint


def _event_row(event: HistoryEvent) -> tuple[Any, ...]:
    return (
        ago(event.at),
        event.attempt or "",
        event.state,
        " ".join(filter(None, (event.reason, event.message))),
    )


def runs(records: Sequence[RunRecord], json: bool) -> None:
    """Runs, a row each; `--json` gives every field."""
    if json:
        as_json([asdict(r) for r in records])
        return
    columns = ("run", "job", "name", "status", "held-out loss", "tokens", "N", "FLOPs", "seconds")
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
            number(r.wall_seconds),
        )
        for r in records
    ]
    table(columns, rows)


def run(record: RunRecord, url: str, json: bool) -> None:
    """One run's record."""
    if json:
        as_json({**asdict(record), "url": url})
        return
    pairs({k: v for k, v in asdict(record).items() if v is not None})
    page(url, "\n")


def page(url: str, before: str = "in MLflow       ") -> None:
    """A run's page, and the table in which it stands."""
    raw(f"{before}{url}")
    raw(f"{'all runs':<{len(before)}}{table_beside(url)}" if before.strip() else table_beside(url))


def comparison(values: Mapping[str, Sequence[Any]], json: bool) -> None:
    """Rows: what differs; columns: runs. The first row names the runs."""
    if json:
        as_json(values)
        return
    names = [str(n) for n in values["run_id"]]
    table(("", *names), [(key, *row) for key, row in values.items() if key != "run_id"])


def samples(rows: Sequence[Mapping[str, Any]], json: bool) -> None:
    """A policy's responses with their rewards, a row each."""
    if json:
        as_json(rows)
        return
    columns = ("iteration", "reward", "prompt", "response")
    cells = [[row[name] for name in columns] for row in rows]
    table(columns, [(step, number(reward), repr(prompt), repr(text)) for step, reward, prompt, text in cells])


def exported(directory: Path, adapter: bool) -> None:
    """Where an export lies, and how it is opened."""
    raw(f"{directory}")
    name = repr(str(directory))
    opens = f"peft.PeftModel.from_pretrained(base, {name})"
    note(f"opens with {opens if adapter else f'transformers.AutoModelForCausalLM.from_pretrained({name})'}")


def garbage(found: Garbage, deleted: bool, json: bool) -> None:
    """Checkpoints that the retention rule gives up, and their size."""
    if json:
        as_json(asdict(found))
        return
    table(("checkpoint", "MB"), [(path, f"{size / 1e6:.1f}") for path, size in found.checkpoints])
    total = sum(size for _, size in found.checkpoints) / 1e6
    raw(f"{total:.1f} MB {'freed' if deleted else 'could be freed: escala gc --delete'}")
    for reason in found.damaged:
        note(f"left alone: {reason}; delete it yourself when you do not need it")


def follow(states: Iterable[Watched]) -> Job:
    """A progress bar over the states of a job as they come; returns the last."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
    )
    last: Watched | None = None
    with Bar(*columns, TextColumn("{task.fields[facts]}"), console=_err) as bar:
        task = bar.add_task("queued", total=1, facts="")
        for last in states:
            progress = last.progress
            bar.update(
                task,
                description=last.job.state,
                completed=progress.step if progress else 0,
                total=progress.total_steps if progress else 1,
                facts=_facts(progress) if progress else last.doing,
            )
    if last is None:
        raise EscalaError("the job vanished while it was followed", "escala ps --all")
    submitted(last.job, False)
    if last.job.state == "failed" and last.job.message:
        _err.print(f"[bold red]failed:[/] {escape(last.job.message)}")
    return last.job


def _facts(progress: Progress) -> str:
    parts = []
    if progress.loss_nats is not None:
        parts.append(f"loss {progress.loss_nats:.3f}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.model_flops_utilization is not None:
        parts.append(f"MFU {progress.model_flops_utilization:.0%}")
    left = progress.remaining_seconds
    if left is None and progress.step:
        left = progress.wall_seconds / progress.step * (progress.total_steps - progress.step)
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows under their headings; an empty cell for None."""
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    _out.print(grid)


def pairs(values: Mapping[str, Any]) -> None:
    """A name and its value a line."""
    width = max((len(k) for k in values), default=0)
    for key, value in values.items():
        raw(f"  {key:<{width}}  {number(value)}")


def number(value: Any) -> str:
    """A number for people: rounded, with separators."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:.4g}"
            if abs(value) >= 1e5 or 0 < abs(value) < 1e-3
            else f"{value:,.4f}".rstrip("0").rstrip(".")
        )
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours too."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def ago(at: float | None) -> str:
    """How long since a Unix time."""
    return "" if at is None else f"{duration(max(0.0, time.time() - at))} ago"


def step(text: str) -> None:
    """The heading of one part of a longer story."""
    _out.print(f"\n[bold]{escape(text)}[/]")
