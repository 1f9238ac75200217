"""The checkpoints that a home's retention rules no longer keep."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from escala.contract import checkpoints
from escala.contract.errors import SpecError
from escala.contract.records import JobFiles
from escala.jobs.actions import open_store
from escala.jobs.state import FINAL
from escala.settings import Settings


@dataclass(frozen=True)
class Garbage:
    """Checkpoints that the retention rule gives up: (path, bytes); and why others cannot be used, which nobody but you
    deletes.
    """

    checkpoints: list[tuple[str, int]]
    damaged: list[str] = field(default_factory=list)


def collect_garbage(
    settings: Settings, name: str | None = None, keep: int | None = None, delete: bool = False
) -> Garbage:
    """The checkpoints beyond each job's retention rule (or beyond `keep`); freed with `delete`.

    Jobs that wait or run are left alone: their own rule works while they write. Raises SpecError for a `keep` below 1
    and for a job that has not ended, NotFoundError.
    """
    if keep is not None and keep < 1:
        raise SpecError("--keep must be at least 1", "a job without a checkpoint cannot be resumed")
    with open_store(settings) as store:
        ended = [store.get(name)] if name else store.list(FINAL)
    found, damaged = list[tuple[str, int]](), list[str]()
    for each in ended:
        if each.state not in FINAL:
            raise SpecError(f"job {each.id} is {each.state}", "its own retention rule works while it runs")
        directory = JobFiles(settings.home, each.id).checkpoints
        rule = keep or int(each.config.get("training", {}).get("keep_checkpoints", 1))
        retention = checkpoints.retention(directory, rule)
        found += [_size(directory / name) for name in retention.delete]
        damaged += [error.message for error in retention.damaged]
    if delete:
        for path, _ in found:
            shutil.rmtree(path)
    return Garbage(found, damaged)


def _size(directory: Path) -> tuple[str, int]:
    return str(directory), sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
