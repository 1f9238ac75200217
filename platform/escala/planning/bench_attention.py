"""`escala bench attention`: a job that measures each kind of attention, and the table in the cluster's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala import documents, spec
from escala.contract.errors import SpecError
from escala.hardware import load_cluster
from escala.planning.bench import enqueue, measured, rounded
from escala.report import Report, silent
from escala.schema import AttentionBenchConfig
from escala.schema.attention.speed import KindSpeed, with_overtaking
from escala.schema.hardware import Cluster
from escala.schema.workloads import BENCH_ATTENTION
from escala.settings import Settings

if TYPE_CHECKING:
    from escala.jobs.records import Job


def bench_attention(
    settings: Settings, overrides: Mapping[str, Any] | None = None, report: Report = silent
) -> Job:
    """Queue the measurement. `overrides`: fields of AttentionBenchConfig. Raises SpecError, ClusterError."""
    config: AttentionBenchConfig = spec.validate(
        AttentionBenchConfig, dict(overrides or {}), BENCH_ATTENTION.name
    )
    return enqueue(settings, BENCH_ATTENTION, config, report)


def check_file(path: Path) -> None:
    """Raise SpecError, or NotFoundError, where the cluster's file `path` has no device of its own to hold the table."""
    if not path.is_file():
        raise SpecError(f"there is no cluster's file {path}", f"escala bench device --to {path}, first")
    load_cluster(path)
    if isinstance(documents.read_yaml(path).get("device"), str):
        raise SpecError(f"{path} names a device of devices.yaml", "give --to another file")


def write_attention(settings: Settings, name: str, path: Path) -> Cluster:
    """Write into the cluster's file what the job `name` measured, with the T at which each kind overtakes exact. A
    precision that it has not measured stays, as all the rest.

    Raises NotFoundError; StateError where the job has not succeeded; SpecError where the file holds no device.
    """
    check_file(path)
    job, found, source = measured(settings, name, BENCH_ATTENTION)
    layer = {key: job.config[key] for key in ("heads", "head_size", "window_tokens", "features")}
    data = documents.read_yaml(path)
    tables = data["device"].setdefault("attention", {})
    for precision, kinds in found["precisions"].items():
        tables[precision] = {**layer, "kinds": _kinds(kinds), "source": f"{source}, {found['device']}"}
    cluster: Cluster = spec.validate(Cluster, data, path.name)
    path.write_text(documents.dump(data))
    return cluster


def _kinds(found: Mapping[str, Any]) -> dict[str, Any]:
    """Each kind's speed as the file has it: three digits; what is empty is left out."""
    speeds = {}
    for kind, each in found.items():
        sides = {
            side: {int(context): rounded(value) for context, value in each[side].items()}
            for side in ("forward", "train", "decode")
        }
        speeds[kind] = KindSpeed.model_validate({**sides, "left_out": each["left_out"]})
    return {
        kind: speed.model_dump(mode="python", exclude_defaults=True)
        for kind, speed in with_overtaking(speeds).items()
    }
