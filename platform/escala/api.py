"""What the CLI, a server and notebooks call: the cluster, jobs, sweeps, laws, runs, checkpoints. Most of it is the
rooms' own `service` modules, named here.

Everything heavy (ray, mlflow, the database) is imported by the function that needs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala import preflight, spec
from escala.contract.errors import CheckpointError, NotFoundError, SpecError
from escala.contract.records import JobFiles, RunRecord
from escala.jobs.actions import (
    MOST_ROWS,
    JobDetails,
    Report,
    Watched,
    check_limit,
    job,
    jobs,
    logs,
    open_store,
    resume,
    retry,
    silent,
    start,
    stop,
    watch,
)
from escala.jobs.references import resolve_jobs, resolve_rollouts
from escala.jobs.state import FINAL
from escala.jobs.tracked_runs import compare, finished_run, history, run, run_url, runs, samples
from escala.runtime_env import source_paths
from escala.schema.workloads import get_workload
from escala.settings import Settings
from escala.storage.checkpoints import open_checkpoints, retention
from escala.sweeps.launch import fit_sweeps, plan_sweep, preview_sweeps, space_base, sweep, sweep_points

if TYPE_CHECKING:
    from escala.cluster import ClusterStatus
    from escala.hardware import Cluster
    from escala.jobs.records import Job
    from escala.planning.cost import Cost
    from escala.rollouts.serve_interface import RolloutsStatus

__all__ = [
    "FINAL",
    "MOST_ROWS",
    "Garbage",
    "JobDetails",
    "NotFoundError",
    "RunRecord",
    "SpecError",
    "Watched",
    "check_limit",
    "collect_garbage",
    "compare",
    "cost",
    "down",
    "export",
    "finished_run",
    "fit_sweeps",
    "history",
    "job",
    "jobs",
    "logs",
    "plan_sweep",
    "preview_sweeps",
    "resolve",
    "resume",
    "retry",
    "rollouts_down",
    "rollouts_scale",
    "rollouts_status",
    "rollouts_up",
    "run",
    "run_url",
    "runs",
    "samples",
    "space_base",
    "status",
    "stop",
    "submit",
    "submit_run",
    "sweep",
    "sweep_points",
    "up",
    "watch",
]
LATER = {
    "escala.laws.queries": (
        "calibration",
        "compare_laws",
        "export_law",
        "fit_file",
        "law",
        "laws",
        "plot_law",
        "preview_file",
        "predict_law",
        "promote_law",
    ),
    "escala.planning.plans": ("plan_front", "plan_law", "plan_target", "propose_runs"),
    "escala.planning.explore": ("Exploration", "explore"),
    "escala.planning.bench": ("bench_device", "write_cluster"),
}


def __getattr__(name: str) -> Any:
    """What laws and plans offer, from their own services at its first use: a query waits for nothing else."""
    home = next((home for home, names in LATER.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'escala.api' has no attribute '{name}'")
    return getattr(import_module(home), name)


# The cluster


def up(report: Report = silent) -> ClusterStatus:
    """Start what is missing of the embedded cluster. Raises ClusterError, naming a taken port or a dead process."""
    from escala import cluster

    return cluster.up(Settings(), report)


def down(report: Report = silent) -> None:
    """End the processes that `up` started, and no others."""
    from escala import cluster

    cluster.down(Settings(), report)


def status() -> ClusterStatus:
    """The processes of the cluster and whether they answer."""
    from escala import cluster

    return cluster.status(Settings())


def trouble() -> str | None:
    """Why no job moves on now, and what to do; None where nothing stands in the way. Milliseconds."""
    from escala import cluster

    return cluster.trouble(Settings())


# Rollouts


def rollouts_up(
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    name: str = "escala",
    report: Report = silent,
    code: str | Path | None = None,
) -> RolloutsStatus:
    """Start the rollout service and wait for it. Args and errors as `escala.rollouts.deployment.up`."""
    from escala.rollouts import deployment

    return deployment.up(files, overrides, name, report, code=code, resolve=resolve_rollouts)


def rollouts_status(name: str = "escala") -> RolloutsStatus:
    """The rollout service as it is. Raises ClusterError where the cluster does not answer."""
    from escala.rollouts import deployment

    return deployment.status(name)


def rollouts_scale(
    min_replicas: int | None = None,
    max_replicas: int | None = None,
    requests_per_replica: float | None = None,
    name: str = "escala",
) -> RolloutsStatus:
    """Move the bounds of the scaling policy. Errors as `escala.rollouts.deployment.scale`."""
    from escala.rollouts import deployment

    return deployment.scale(min_replicas, max_replicas, requests_per_replica, name)


def rollouts_down(name: str = "escala", report: Report = silent) -> None:
    """Remove the rollout service, what it generates finished first. Raises NotFoundError, ClusterError."""
    from escala.rollouts import deployment

    deployment.down(name, report)


# Jobs


def resolve(
    workload: str,
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    compute_flops: float | None = None,
    law: str | None = None,
    code: str | Path | None = None,
) -> spec.Resolved:
    """The spec in full and what it costs; starts nothing. Args and errors as `submit`."""
    loaded = _load(workload, files, overrides, options, compute_flops, law)
    _ready(loaded, code, keep=False)
    return spec.resolve(loaded)


def cost(answer: spec.Resolved, cluster: str | Path | None = None) -> tuple[Cost, Cluster]:
    """What a resolved job costs on a cluster: a name in clusters/, or a file; None: ESCALA_CLUSTER.

    Raises NotFoundError, SpecError.
    """
    from escala.hardware import load_cluster
    from escala.planning import cost as planning

    loaded = load_cluster(cluster or Settings().cluster)
    return planning.cost(answer.spec.trained, loaded), loaded


def submit(
    workload: str,
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    report: Report = silent,
    compute_flops: float | None = None,
    law: str | None = None,
    base: Mapping[str, Any] | None = None,
    code: str | Path | None = None,
) -> Job:
    """Check a job, bring the cluster up where none is configured, and queue the job.

    Args:
        workload, files, overrides, options: see `spec.load_job`.
        compute_flops: the one dial: model, tokens, batch and learning rate follow from it by recipe, where files and
            overrides do not fix them.
        law: whose optimum splits `compute_flops` into N and D; None: 20 tokens per parameter.
        base: a configuration to start from, instead of the defaults.
        code: the directory of the user's modules (reward functions); None: the present one, where they are in it. They
            are copied into the home.

    Raises SpecError, LawError or NotFoundError, and as `jobs.actions.enqueue`: where something is raised nothing is
    queued. A cluster that cannot be brought up is a warning of the logger `escala.jobs`, and the job stays queued.
    """
    loaded = _load(workload, files, overrides, options, compute_flops, law, base)
    return start(loaded, report, code=_ready(loaded, code))


def _ready(job: spec.JobSpec, code: str | Path | None, keep: bool = True) -> str | None:
    """What can be known before it is queued, checked; the digest of the user's modules."""
    waits = job.options.after is not None
    return preflight.ready(job.kind.inputs, job.plain(), Settings().home, code, waits, keep)


def _load(
    workload: str,
    files: Iterable[str | Path],
    overrides: Iterable[str],
    options: Mapping[str, Any] | None,
    compute_flops: float | None,
    law: str | None,
    base: Mapping[str, Any] | None = None,
) -> spec.JobSpec:
    written, options = resolve_jobs(spec.written(files, overrides, base), dict(options or {}))
    if compute_flops is None:
        if law is not None:
            raise SpecError(
                f"--law {law} splits a budget, and none is given", "add --compute-flops, e.g. 1e18"
            )
        return spec.load_job(workload, options=options, base=written)
    if not get_workload(workload).chooses_model:
        raise SpecError(
            f"--compute-flops chooses a model, and {workload} starts from one",
            "give training.train_tokens or training.steps",
        )
    from escala.sweeps.recipes import by_recipe

    axes = {"compute_flops": compute_flops}
    if law is not None:
        from escala.planning.limits import Limits
        from escala.planning.plans import PlanOptions, plan_law

        options_ = PlanOptions(context_tokens=_context(written))
        axes["n_total"] = plan_law(law, Limits(compute_flops=compute_flops), options_).plan.n_total
    return spec.load_job(workload, options=options, base=spec.merge(by_recipe(written, axes), written))


def _context(written: Mapping[str, Any]) -> float | None:
    """The context length that a spec states; None where it leaves it to the defaults."""
    stated: float | None = written.get("training", {}).get("context_tokens")
    return stated or written.get("model", {}).get("max_context_tokens")


def submit_run(
    law: str,
    n_active: float,
    n_total: float,
    tokens: float,
    overrides: Iterable[str] = (),
    report: Report = silent,
) -> Job:
    """Queue a run of N and D that is configured like the law's runs. Raises SpecError for a law that knows none."""
    from escala.laws.queries import law as load
    from escala.planning.plans import config_for

    config = config_for(load(law), n_active, n_total, tokens, tuple(overrides))
    return start(spec.load_job("pretrain", base=config, options={"name": law.replace("@", "-")}), report)


# Checkpoints


def export(name: str, to: Path, adapter: bool = False) -> Path:
    """Write the newest checkpoint of a run or a job into `to`, for transformers, vLLM, or (`adapter`) peft.

    The weights are read by a process of their own: nothing here knows tensors.

    Raises NotFoundError, SpecError where `to` holds something, CheckpointError with the process's own words.
    """
    try:
        found = job(name).job
    except NotFoundError:
        found = job(run(name).job_id).job
    if get_workload(found.workload).result == "points":
        raise SpecError(
            f"job {found.id} is a {found.workload}, which has no checkpoint of its own",
            "submit its best spec as a job",
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise SpecError(f"{to} is there and not empty", "give a new directory")
    checkpoints = JobFiles(Settings().home, found.id).checkpoints
    command = [sys.executable, "-m", "workloads.export", str(checkpoints), str(to.absolute())]
    paths = os.pathsep.join([*source_paths(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *(["--adapter"] if adapter else [])],
        env={**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        message, _, hint = done.stderr.strip().partition("\n  hint: ")
        raise CheckpointError(message.splitlines()[-1] if message else "the export was killed", hint)
    return to


@dataclass(frozen=True)
class Garbage:
    """Checkpoints that the retention rule gives up: (path, bytes); and why others cannot be used, which nobody but you
    deletes.
    """

    checkpoints: list[tuple[str, int]]
    damaged: list[str] = field(default_factory=list)


def collect_garbage(name: str | None = None, keep: int | None = None, delete: bool = False) -> Garbage:
    """The checkpoints beyond each job's retention rule (or beyond `keep`); freed with `delete`.

    Jobs that wait or run are left alone: their own rule works while they write.
    """
    if keep is not None and keep < 1:
        raise SpecError("--keep must be at least 1", "a job without a checkpoint cannot be resumed")
    with open_store() as store:
        ended = [store.get(name)] if name else store.list(FINAL)
    home, found, damaged = Settings().home, list[tuple[str, int]](), list[str]()
    for each in ended:
        if each.state not in FINAL:
            raise SpecError(f"job {each.id} is {each.state}", "its own retention rule works while it runs")
        kept = open_checkpoints(JobFiles(home, each.id).checkpoints)
        rule = keep or int(each.config.get("training", {}).get("keep_checkpoints", 1))
        freed = retention(kept, rule)
        found += [(f"{kept.address}/{name}", kept.size_bytes(name)) for name in freed.delete]
        damaged += [error.message for error in freed.damaged]
        if delete:
            for name in freed.delete:
                kept.delete(name)
    return Garbage(found, damaged)
