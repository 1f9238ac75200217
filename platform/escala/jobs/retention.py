"""The checkpoints that a home's retention rules no longer keep."""

from __future__ import annotations

from dataclasses import dataclass, field

from escala.contract.errors import SpecError
from escala.contract.records import JobFiles
from escala.jobs.actions import open_store
from escala.jobs.state import FINAL
from escala.settings import Settings
from escala.storage.checkpoints import open_checkpoints, retention


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
        kept = open_checkpoints(JobFiles(settings.home, each.id).checkpoints)
        rule = keep or int(each.config.get("training", {}).get("keep_checkpoints", 1))
        freed = retention(kept, rule)
        found += [(f"{kept.address}/{name}", kept.size_bytes(name)) for name in freed.delete]
        damaged += [error.message for error in freed.damaged]
        if delete:
            for name in freed.delete:
                kept.delete(name)
    return Garbage(found, damaged)
