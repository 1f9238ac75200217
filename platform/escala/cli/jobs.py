"""`escala submit | ps | logs | stop | gc | export` and `escala jobs show | retry | resume`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from escala.cli import progress, render, render_plans
from escala.cli.cluster import Json
from escala.cli.home import open_home

if TYPE_CHECKING:
    from escala.client import Escala
    from escala.views.jobs import JobView, WatchedJobView

JobName = Annotated[
    str,
    typer.Argument(
        help="A job's id, the start of one, or its name: the newest of it that succeeded or runs."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key: a.b=value.", metavar="A.B=C")
]
Files = Annotated[
    list[Path] | None, typer.Argument(help="YAML specs; later ones win.", metavar="[FILE.yaml]...")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved spec and its cost; start nothing.")
]
Code = Annotated[
    Path | None,
    typer.Option(
        help="Where your modules (reward functions) are; they are copied. [default: this directory]",
        metavar="DIR",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key",
        help="Any text of yours: the same key again is the same job, not a second one.",
        metavar="KEY",
    ),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Stay and show the progress.")]

nouns = typer.Typer(help="One job: its history, another try, a continuation.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(cls=SubmitCommand)(submit)
    for verb in (ps, logs, stop, gc, export):
        app.command()(verb)
    nouns.command()(show)
    nouns.command()(retry)
    nouns.command()(resume)
    app.add_typer(nouns, name="jobs")


class SubmitCommand(TyperCommand):
    """`escala submit`, whose help lists the workloads that there are; they are read when the help is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        from escala.schema.workloads import submittable

        listed = [f"{each.name}: {each.summary}" for each in submittable()]
        self.epilog = "\n\n".join(["Workloads:", *listed])
        super().format_help(ctx, formatter)


def _workloads(incomplete: str) -> list[str]:
    """The workloads whose names begin so, for the shell's completion."""
    from escala.schema.workloads import submittable

    return [each.name for each in submittable() if each.name.startswith(incomplete)]


def submit(
    workload: Annotated[str, typer.Argument(help="What to run; see below.", autocompletion=_workloads)],
    files: Files = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="For people; need not be unique.")] = None,
    priority: Annotated[int | None, typer.Option(help="0-100, higher first. [default: 50]")] = None,
    retries: Annotated[
        int | None, typer.Option(help="After a lost worker, node or driver. [default: 2]")
    ] = None,
    after: Annotated[str | None, typer.Option(help="A job that must succeed first.", metavar="JOB")] = None,
    compute_flops: Annotated[
        float | None, typer.Option(help="The one dial: model, tokens, batch, learning rate by recipe.")
    ] = None,
    law: Annotated[
        str | None, typer.Option(help="Whose optimum splits --compute-flops. [default: 20 tokens/parameter]")
    ] = None,
    seal: Annotated[
        bool, typer.Option("--seal", help="Seal what --law says of the run before it is queued.")
    ] = False,
    max_flops: Annotated[float | None, typer.Option(help="Budget over all attempts.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Budget over all attempts.")] = None,
    code: Code = None,
    idempotency_key: Key = None,
    follow: Follow = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Queue a job; starts the embedded cluster when none is configured."""
    escala = open_home()
    options = {
        "name": name,
        "priority": priority,
        "retries": retries,
        "after": after,
        "max_flops": max_flops,
        "max_seconds": max_seconds,
        "idempotency_key": idempotency_key,
    }
    if dry_run:
        answer = escala.resolve(workload, files or (), overrides or (), options, compute_flops, law, code)
        render_plans.resolved(answer, json)
        return
    with progress.reporting("submitting", json) as report:
        job = escala.submit(
            workload, files or (), overrides or (), options, report, compute_flops, law, code=code, seal=seal
        )
    render.submitted(job, json)
    if follow:
        follow_job(escala, job.id, json)


def ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Finished jobs too.")] = False,
    limit: Annotated[int, typer.Option(help="At most so many rows.")] = 50,
    json: Json = False,
) -> None:
    """List the jobs that wait or run."""
    from escala.jobs.actions import MOST_ROWS, check_limit
    from escala.jobs.state import FINAL

    check_limit(limit)
    escala = open_home()
    found = escala.jobs(everything=everything, limit=min(limit + 1, MOST_ROWS))
    render.jobs(found[:limit], json)
    if len(found) > limit:
        render.note(f"the first {limit:,}; --limit shows more")
    elif not found:
        render.note(
            "there are no jobs" if everything else "no jobs wait or run; `escala ps --all` shows others"
        )
    if any(job.state not in FINAL for job in found) and (why := escala.trouble()):
        render.note(why)


def logs(job: JobName, follow: Follow = False) -> None:
    """Print a job's output, all attempts in order."""
    for line in open_home().logs(job, follow=follow):
        render.raw(line)


def stop(job: JobName, json: Json = False) -> None:
    """Ask a job to write a checkpoint and stop; one that has not made a step stops at once."""
    render.submitted(open_home().stop(job), json)


def gc(
    job: Annotated[str | None, typer.Argument(help="Only this job's checkpoints.")] = None,
    keep: Annotated[
        int | None, typer.Option(help="Checkpoints to keep a job. [default: each job's own rule]")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Free the space; without it, only show.")] = False,
    json: Json = False,
) -> None:
    """Show the checkpoints that the retention rule no longer keeps, and free them."""
    render.garbage(open_home().collect_garbage(job, keep=keep, delete=delete), json)


def export(
    run: Annotated[str, typer.Argument(help="A run's id (or its start), or a job's id or name.")],
    to: Annotated[Path, typer.Option(help="A directory that is new or empty.", metavar="DIR")],
    adapter: Annotated[bool, typer.Option("--adapter", help="LoRA's deltas alone, for peft.")] = False,
    gguf: Annotated[
        Literal["fp32", "int8", "int4"] | None,
        typer.Option("--gguf", help="A model.gguf: matrices in codes as they are, others in this precision."),
    ] = None,
) -> None:
    """Write a run's newest checkpoint for transformers and vLLM: weights, tokenizer, chat template."""
    with progress.working("exporting"):
        written = open_home().export(run, to, adapter, gguf)
    render.exported(written, adapter)


def show(job: JobName, json: Json = False) -> None:
    """Show a job: state, reason, attempts, totals, events, the run of each attempt."""
    render.job(open_home().job(job), json)


def retry(job: JobName, follow: Follow = False, json: Json = False) -> None:
    """Queue a failed or stopped job again; it continues from its last checkpoint."""
    escala = open_home()
    with progress.reporting("submitting", json) as report:
        again = escala.retry(job, report=report)
    render.submitted(again, json)
    if follow:
        follow_job(escala, again.id, json)


def resume(
    job: JobName,
    overrides: Overrides = None,
    idempotency_key: Key = None,
    follow: Follow = False,
    json: Json = False,
) -> None:
    """Submit a new job that starts from another one's last checkpoint (more steps, other workers, ...)."""
    escala = open_home()
    with progress.reporting("submitting", json) as report:
        new = escala.resume(job, overrides or (), report, idempotency_key)
    render.submitted(new, json)
    if follow:
        follow_job(escala, new.id, json)


def follow_job(escala: Escala, job_id: str, json: bool = False) -> None:
    """Progress until the job ends; exit 1 unless it succeeded."""
    if followed(escala, job_id, json).state != "succeeded":
        raise typer.Exit(1)


def followed(escala: Escala, job_id: str, json: bool = False) -> JobView:
    """Progress until the job ends, and whatever keeps it from moving on meanwhile; the job as it ended."""
    return progress.follow(_with_trouble(escala, escala.watch(job_id)), json)


def _with_trouble(escala: Escala, states: Iterator[WatchedJobView]) -> Iterator[WatchedJobView]:
    """The states as they come; whatever keeps the job from moving on is said when it begins and when it ends."""
    from escala.jobs.state import FINAL

    said: str | None = None
    for state in states:
        why = None if state.job.state in FINAL else escala.trouble()
        if why != said:
            render.note(why or "it goes on")
        said = why
        yield state
