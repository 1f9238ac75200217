"""`escala compress`: a job that says what a model's matrices hold, and writes it in fewer bits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala import spec
from escala.contract.errors import NotFoundError, SpecError
from escala.hardware import load_cluster
from escala.jobs import actions, tracked_runs
from escala.jobs.references import resolve_jobs
from escala.report import Report, silent
from escala.schema.compress import CompressConfig
from escala.schema.workloads import COMPRESS
from escala.settings import Settings

if TYPE_CHECKING:
    from escala.jobs.records import Job


RUN_ID = re.compile(r"[0-9a-f]{4,32}")
"""Of the tracker, or its start: nothing else is looked for there."""


def compress(
    settings: Settings,
    model: str,
    asked: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    report: Report = silent,
) -> Job:
    """Queue the compression of a model.

    Args:
        model: a job's id or name, a run's id, or the path of a model.
        asked: keys of CompressConfig, under the `overrides` (`a.b=value`).
        options: fields of JobOptions.

    Raises NotFoundError; SpecError, for joules too where the cluster's file states no coefficients; and as
    `jobs.actions.enqueue`.
    """
    written = spec.written((), overrides, {**(asked or {}), "start": _start(settings, model)})
    written, chosen = resolve_jobs(settings, written, dict(options or {}))
    config: CompressConfig = spec.validate(CompressConfig, written, COMPRESS.name)
    _check_objective(settings, config)
    checked = spec.job_options({}, chosen)
    return actions.start(settings, spec.JobSpec(COMPRESS.name, COMPRESS.entry_point, checked, config), report)


def _start(settings: Settings, model: str) -> dict[str, str]:
    if Path(model).expanduser().exists():
        return {"path": model}
    try:
        return {"job": actions.job(settings, model).job.id}
    except NotFoundError:
        if not RUN_ID.fullmatch(model):
            raise _unknown(model) from None
    try:
        return {"job": tracked_runs.run(settings, model).job_id}
    except NotFoundError:
        raise _unknown(model) from None


def _unknown(model: str) -> NotFoundError:
    return NotFoundError(
        f"there is no path, no job and no run {model!r}", "give a model's path, or a job's id or name"
    )


def _check_objective(settings: Settings, config: CompressConfig) -> None:
    rates = load_cluster(settings.cluster).rates()
    if config.objective == "joules" and (rates.joules_per_byte is None or rates.joules_per_flop is None):
        raise SpecError(
            f"the cluster {settings.cluster} states no joules_per_byte and joules_per_flop",
            "state them in its file, each with its source, or ask for bytes",
        )
