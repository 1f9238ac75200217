"""`escala bench device`: a job that measures what one worker does, and the cluster's file that comes of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala import documents, spec
from escala.contract.errors import NotFoundError, SpecError, StateError
from escala.contract.records import JobFiles
from escala.jobs import actions
from escala.planning.cost import cost
from escala.report import Report, silent
from escala.schema import AttentionBenchConfig, BenchConfig, PretrainConfig
from escala.schema.hardware import Cluster
from escala.schema.workloads import BENCH, Workload
from escala.settings import Settings

if TYPE_CHECKING:
    from escala.jobs.records import Job

SINGLE = ("memory_bytes", "memory_bytes_per_second", "optimizer_parameters_per_second", "runtime_bytes")
LINKS = ("link_bytes_per_second", "link_seconds")  # None where one worker measured alone


def bench_device(
    settings: Settings,
    workers: int = 1,
    gpus_per_worker: int = 0,
    overrides: Mapping[str, Any] | None = None,
    report: Report = silent,
) -> Job:
    """Queue the measurement on as many workers as the cluster has devices. Raises SpecError, ClusterError."""
    resources = {"workers": workers, "gpus_per_worker": gpus_per_worker}
    config: BenchConfig = spec.validate(
        BenchConfig, {**(overrides or {}), "resources": resources}, BENCH.name
    )
    return enqueue(settings, BENCH, config, report)


def enqueue(
    settings: Settings, workload: Workload, config: BenchConfig | AttentionBenchConfig, report: Report
) -> Job:
    """Queue a measurement. Raises ClusterError."""
    from escala.jobs.records import NewJob

    new = NewJob(
        workload=workload.name,
        entry_point=workload.entry_point,
        config=config.model_dump(mode="json"),
        name=workload.name,
        command=tuple(sys.argv),
        experiment=settings.experiment,
    )
    return actions.enqueue(settings, new, report)


def write_cluster(settings: Settings, name: str, path: Path) -> Cluster:
    """Write the cluster's file from what the bench job `name` measured. What the file says of prices and energy stays.

    Raises NotFoundError; StateError where the job has not succeeded; SpecError where the present file is none.
    """
    job, found, source = measured(settings, name, BENCH)
    old = documents.read_yaml(path) if path.is_file() else {}
    kept = old.get("device")
    if isinstance(kept, str):
        raise SpecError(f"{path} names a device of devices.yaml", "give --to another file")
    data = {
        "about": f"{found['workers']} x {found['device']}",
        **{key: value for key, value in old.items() if key not in ("about", "device", "devices")},
        "devices": found["workers"],
        "device": {**(kept or {}), **_device(found, source)},
    }
    data["device"].pop("utilization", None)
    unslowed: Cluster = spec.validate(Cluster, data, path.name)
    for precision, each in found["precisions"].items():
        data["device"]["training"][precision]["efficiency"] = {
            step["zero_stage"]: _efficiency(precision, step, job.config, unslowed) for step in each["steps"]
        }
    cluster: Cluster = spec.validate(Cluster, data, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(documents.dump(data))
    return cluster


def measured(settings: Settings, name: str, workload: Workload) -> tuple[Job, dict[str, Any], str]:
    """What the job `name` of a `workload` that measures has found: (job, facts, how a file names it).

    Raises NotFoundError for a job of another workload; StateError where it has not succeeded.
    """
    details = actions.job(settings, name)
    if details.job.workload != workload.name:
        raise NotFoundError(
            f"job {details.job.id} is a {details.job.workload}, not a {workload.name}", "escala ps --all"
        )
    if details.job.state != "succeeded":
        raise StateError(f"job {details.job.id} is {details.job.state}", f"escala logs {details.job.id}")
    found: dict[str, Any] = json.loads(
        JobFiles(settings.home, details.job.id).attempt(details.job.attempts).facts.read_text()
    )
    run = next((run for run in reversed(details.runs) if run), None)
    day = time.strftime("%Y-%m-%d", time.gmtime(details.job.submitted_at))
    return details.job, found, f"{workload.started_by}, {day}, run {run or details.job.id}"


def _efficiency(
    precision: str, step: Mapping[str, Any], bench: Mapping[str, Any], unslowed: Cluster
) -> float:
    """Compute by its parts, over what the measured step took beside its communication."""
    parts = cost(_config_of_step(precision, step, bench), unslowed)
    compute = step["seconds"] - parts.exposed_seconds
    return rounded(min(1.0, parts.compute_seconds / compute)) if compute > 0 else 1.0


def _config_of_step(precision: str, step: Mapping[str, Any], bench: Mapping[str, Any]) -> PretrainConfig:
    """The configuration of the whole step that workloads/bench.py measured."""
    workers = bench["resources"]["workers"]
    sequences, vocabulary = bench["tokens"] // bench["context_tokens"], bench["vocab_size"]
    config: PretrainConfig = spec.validate(
        PretrainConfig,
        {
            "model": {
                "n_layers": step["n_layers"],
                "d_model": step["d_model"],
                "n_heads": max(1, step["d_model"] // 64),
                "vocab_size": vocabulary,
                "max_context_tokens": bench["context_tokens"],
            },
            "data": {"tokenizer": {"vocab_size": vocabulary}},
            "training": {
                "batch_sequences": sequences * workers,
                "precision": precision,
                "zero_stage": step["zero_stage"],
            },
            "resources": bench["resources"],
        },
        "bench",
    )
    return config


def _device(found: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The part of a device that was measured, rounded to three digits."""
    precisions = found["precisions"]
    numbers = {key: found[key] for key in (*SINGLE, *LINKS) if found[key] is not None}
    return {
        "about": found["device"],
        "measured": source,
        **{key: {"value": rounded(value), "source": source} for key, value in numbers.items()},
        "peak_flops_per_second": {
            name: {"value": rounded(each["peak_flops_per_second"]), "source": source}
            for name, each in precisions.items()
        },
        "training": {
            name: {
                "block": {int(width): rounded(v) for width, v in each["block"].items()},
                "recompute": {int(width): rounded(v) for width, v in each["recompute"].items()},
                "head": rounded(each["head"]),
                "alone": rounded(each["alone"]),
                "source": source,
            }
            for name, each in precisions.items()
        },
    }


def rounded(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")
