"""Specs that build on other jobs: a start, a critic's start, a reward model given as `job`, as paths to checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from escala.contract.errors import NotFoundError, SpecError, StateError
from escala.contract.records import JobFiles
from escala.documents import Section
from escala.jobs.actions import open_store
from escala.jobs.records import Job
from escala.jobs.state import FINAL
from escala.settings import Settings
from escala.storage.base import CheckpointStore
from escala.storage.checkpoints import check_readable, list_checkpoints, open_checkpoints

Written = dict[str, Any]


def resolve_jobs(settings: Settings, written: Written, options: Written) -> tuple[Written, Written]:
    """The spec with every `job` that it builds on resolved, and the job's options.

    A job that has not ended is waited for (`--after` it). Raises NotFoundError for a job that is not there, SpecError
    for one that trains no model, and where two must be waited for, CheckpointError for one whose checkpoints are all
    refused.
    """
    places = written.places if isinstance(written, Section) else {}
    written, options = _with_start(settings, written, options)
    if isinstance(written.get("critic"), dict):
        critic, options = _with_start(settings, written["critic"], options)
        written = {**written, "critic": critic}
    if isinstance(written.get("rewards"), list):
        rewards = []
        for reward in written["rewards"]:
            resolved, options = _with_model(settings, reward, options)
            rewards.append(resolved)
        written = {**written, "rewards": rewards}
    return Section(written, places), options


def resolve_rollouts(settings: Settings, arguments: Written) -> Written:
    """The rollout service's arguments with jobs as where their checkpoints are: `model`, where no such path is there,
    and `job` of rewards. Raises NotFoundError; SpecError for a job that trains no model, StateError for one that has
    not ended.
    """
    model = arguments.get("model")
    if isinstance(model, str) and model and not Path(model).expanduser().exists():
        arguments = {**arguments, "model": _ended(settings, model)}
    if isinstance(arguments.get("reward"), list):
        rewards = [_with_model(settings, reward, {})[0] for reward in arguments["reward"]]
        for reward in rewards:
            if isinstance(reward, dict) and isinstance(reward.get("job"), str):
                _ended(settings, reward["job"])
        arguments = {**arguments, "reward": rewards}
    return arguments


def _ended(settings: Settings, name: str) -> str:
    """The checkpoints of a job that has ended."""
    try:
        place, _, options = _checkpoints(settings, name, {})
    except NotFoundError:
        raise NotFoundError(
            f"there is no path and no job {name!r}", "give a model's directory, or a job's id or name"
        ) from None
    if options:
        raise StateError(f"job {place['job']} has not ended", "wait for it, or give the path of a checkpoint")
    return place["path"]


def _with_start(settings: Settings, written: Written, options: Written) -> tuple[Written, Written]:
    """`start.job` as where that job's checkpoints are, and what its model is."""
    start = written.get("start")
    if not isinstance(start, dict) or not isinstance(start.get("job"), str):
        return written, options
    place, model, options = _checkpoints(settings, start["job"], options)
    return {**written, "start": {**start, **place}, "model": model}, options


def _with_model(settings: Settings, reward: Any, options: Written) -> tuple[Any, Written]:
    """`job` of a reward model as where its checkpoints are."""
    if not isinstance(reward, dict) or not isinstance(reward.get("job"), str):
        return reward, options
    place, _, options = _checkpoints(settings, reward["job"], options)
    return {**reward, "job": place["job"], "model": place["path"]}, options


def _checkpoints(settings: Settings, name: str, options: Written) -> tuple[dict[str, str], Any, Written]:
    """(id and checkpoints of a job, its model's configuration, the options with the wait for it)."""
    with open_store(settings) as store:
        found = store.get(name)
    if "model" not in found.config:
        raise SpecError(
            f"job {found.id} ({found.workload}) trains no model", "name a job that has checkpoints"
        )
    if found.state not in FINAL:
        if options.get("after") not in (None, found.id, found.name):
            raise SpecError(
                f"the job waits for {options['after']} already, and {found.id} has not ended either",
                f"submit it once {found.id} has ended",
            )
        options = {**options, "after": found.id}
    checkpoints = open_checkpoints(JobFiles(settings.home, found.id).checkpoints)
    check_readable(checkpoints)
    place = {"job": found.id, "path": checkpoints.address}
    return place, _model(found, checkpoints), options


def _model(found: Job, checkpoints: CheckpointStore) -> Any:
    """What the newest checkpoint holds, since a job may choose its model while it runs; before there is one, what the
    job was queued with.
    """
    stored = list_checkpoints(checkpoints)
    return stored[-1].part("config.model", dict) if stored else found.config["model"]
