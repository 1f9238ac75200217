"""Sweeps, as `escala.client` offers them: plan, start, resume, read the points, fit a law to them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala import preflight, spec
from escala.contract.errors import NotFoundError, SpecError, StateError
from escala.jobs.actions import chosen_tags, enqueue, open_store, retry
from escala.jobs.attention import resolve_attention
from escala.jobs.references import resolve_jobs
from escala.report import Report, silent
from escala.schema.workloads import SWEEP, get_workload
from escala.settings import Settings
from escala.storage import user_code

if TYPE_CHECKING:
    import pandas as pd

    from escala.jobs.records import Job
    from escala.laws.audit import AuditedPoint
    from escala.laws.queries import Fitted, Preview
    from escala.sweeps.plan import SweepPlan
    from escala.sweeps.points import SweepPoints
    from escala.sweeps.space import Space


def plan_sweep(
    settings: Settings,
    space: str,
    overrides: Iterable[str] = (),
    code: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> SweepPlan:
    """What a sweep would train and cost; starts nothing.

    Args:
        space: the name of one in `tune_spaces/`, or a YAML file's path.
        overrides: `a.b=value` on the space's keys.
        options: as of `sweep`; checked.

    Raises NotFoundError, SpecError; also for a trial that the embedded head can never hold.
    """
    from escala.sweeps.plan import make_plan

    name, loaded, checked, chosen = _loaded(settings, space, overrides, options)
    plan = make_plan(name, loaded, settings, chosen)
    _ready(settings, loaded, plan, code, waits=checked.after is not None, keep=False)
    return plan


def _ready(
    settings: Settings, space: Space, plan: SweepPlan, code: str | Path | None, waits: bool, keep: bool = True
) -> str | None:
    """What the first trial needs, checked; the digest of the user's modules."""
    return preflight.ready(
        get_workload(space.workload).inputs,
        plan.trials[0].config,
        settings.home,
        code,
        waits=waits,
        keep=keep,
    )


def sweep(
    settings: Settings,
    space: str,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    resume: bool = False,
    report: Report = silent,
    code: str | Path | None = None,
    seal: str | None = None,
) -> Job:
    """Queue a sweep; or, with `resume`, queue the last interrupted sweep of this very space again.

    Args as `plan_sweep`; `options` are fields of JobOptions; `seal`: a law, whose word on every trial that has not run
    yet is sealed before any starts (laws.forecasts). A trial that any sweep of this home has finished is not
    trained again, resumed or not. Raises as `plan_sweep`; NotFoundError where there is nothing to resume; and as
    `jobs.actions.enqueue`.
    """
    from escala.jobs.records import NewJob
    from escala.sweeps.plan import make_plan

    name, loaded, checked, chosen = _loaded(settings, space, overrides, options)
    plan = make_plan(name, loaded, settings, chosen)
    config = {**loaded.model_dump(mode="json"), "concurrency": plan.concurrency or loaded.concurrency}
    if resume:
        if checked.idempotency_key:
            raise SpecError(
                "--idempotency-key is for a new sweep, and --resume queues an old one again",
                "leave one of the two out",
            )
        return retry(settings, _interrupted(settings, name, config).id, report)
    digest = _ready(settings, loaded, plan, code, waits=checked.after is not None)
    report(f"{len(plan.trials)} trials, {plan.compute_flops:.3g} FLOPs")
    if seal is not None:
        _seal(settings, seal, plan, report)
    new = NewJob(
        workload=SWEEP.name,
        entry_point=SWEEP.entry_point,
        config=config,
        command=tuple(sys.argv),
        experiment=settings.experiment,
        tags={"escala.space": name} | chosen_tags(chosen) | ({user_code.TAG: digest} if digest else {}),
        **checked.model_dump(),
    )
    return enqueue(settings, new, report)


def _seal(settings: Settings, law: str, plan: SweepPlan, report: Report) -> None:
    """Seal what the law says of the trials; those that this home has trained already cannot be foretold any more."""
    from escala.laws import queries
    from escala.laws.forecasts import digest_of, seal_runs

    trained = _trained(settings.home)
    runs = [(t.label, t.config) for t in plan.trials if digest_of(t.config) not in trained]
    known = len(plan.trials) - len(runs)
    if known:
        report(f"{known} of {len(plan.trials)} trials have been trained in this home: they are not sealed")
    if runs:
        seal_runs(settings, queries.law(settings, law), runs, report)


def _trained(home: Path) -> set[str]:
    """Fingerprints of the configurations of all trials that this home has started."""
    from escala.contract.records import AttemptSpec, read_record
    from escala.laws.forecasts import digest_of

    specs = (read_record(AttemptSpec, path) for path in (home / "trials").glob("*/attempt-*/attempt.json"))
    return {digest_of(found.config) for found in specs if found is not None}


def _loaded(
    settings: Settings, space: str, overrides: Iterable[str], options: Mapping[str, Any] | None
) -> tuple[str, Space, spec.JobOptions, dict[str, str]]:
    """(name, the space with the jobs that its base builds on resolved and its kind of attention chosen, the sweep's
    options, what was chosen and why).
    """
    from escala.sweeps.space import contexts, load_space

    name, loaded = load_space(space, overrides)
    base, given = resolve_jobs(settings, dict(loaded.base), dict(options or {}))
    base, chosen = resolve_attention(settings, base, contexts(loaded))
    return name, loaded.model_copy(update={"base": base}), spec.job_options({"name": name}, given), chosen


def space_base(space: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The configuration that a space's trials share, for a run that is to be compared with them."""
    from escala.sweeps.space import load_space

    return dict(load_space(space, overrides)[1].base)


def _interrupted(settings: Settings, space: str, config: Mapping[str, Any]) -> Job:
    """The last sweep of this space, if it was interrupted."""
    with open_store(settings) as store:
        sweeps = store.list(workload=SWEEP.name)
    last = next((each for each in reversed(sweeps) if each.tags.get("escala.space") == space), None)
    if last is None:
        raise NotFoundError(f"no sweep of {space} has been started here", f"escala sweep {space}")
    if last.state not in ("failed", "stopped"):
        raise StateError(
            f"the last sweep of {space}, job {last.id}, is {last.state}", "there is nothing to resume"
        )
    if last.config != config:
        raise SpecError(
            f"the space {space} is not what it was for job {last.id}",
            f"give the same --set, or start a new sweep: what is finished and still asked for is not trained "
            f"again. `escala jobs retry {last.id}` continues the old one",
        )
    return last


def sweep_points(settings: Settings, name: str) -> SweepPoints:
    """The points of a sweep so far, and the refused ones. `name`: its job's id, or a name, whose newest sweep is meant.

    Raises NotFoundError.
    """
    from escala.sweeps.points import read_points

    with open_store(settings) as store:
        newest = store.list(limit=1, workload=SWEEP.name, name=name)
        found = newest[0] if newest else store.get(name)
    if get_workload(found.workload).result != "points":
        raise NotFoundError(f"job {found.id} is a {found.workload}, not a sweep", "escala ps --all")
    return read_points(settings.home, found.id)


def fit_sweeps(settings: Settings, names: Sequence[str], law: str, **asked: Any) -> Fitted:
    """Fit a law to the points of one or several sweeps, and store it as the next version of `law`.

    A trial that is in several of them counts once. `asked` (form, group, size, bootstrap, seed, report): see
    `laws.queries.fit_points`.
    Raises NotFoundError, LawError, ClusterError.
    """
    from escala.laws import queries

    points, sources, shared, audited = _put_together(settings, names)
    asked |= {"sources": sources, "configuration": shared, "audited": audited}
    asked |= {"stated": _stated(settings, names), "group": asked.get("group") or _group(points)}
    return queries.fit_points(settings, points, law, **asked)


def preview_sweeps(settings: Settings, names: Sequence[str], **asked: Any) -> Preview:
    """The law of `fit_sweeps`, not stored. Args and errors as there."""
    from escala.laws import queries

    points, sources, _, audited = _put_together(settings, names)
    asked["group"] = asked.get("group") or _group(points)
    return queries.preview_points(points, sources=sources, audited=audited, **asked)


def _group(points: pd.DataFrame) -> str | None:
    """What is resampled together, unless the user says it: branches of one trunk share seed and data (docs/theory
    D.8).
    """
    return "trunk" if "trunk" in points else None


def _stated(settings: Settings, names: Sequence[str]) -> list[str]:
    """The dotted keys that the bases of all these sweeps' spaces state."""
    from escala.contract.attempt import flatten

    with open_store(settings) as store:
        jobs = [
            (store.list(limit=1, workload=SWEEP.name, name=name) or [store.get(name)])[0] for name in names
        ]
    said = [set(flatten(job.config.get("base") or {})) for job in jobs]
    return sorted(set.intersection(*said)) if said else []


def _put_together(
    settings: Settings, names: Sequence[str]
) -> tuple[pd.DataFrame, list[str], dict[str, Any], list[AuditedPoint]]:
    """(the sweeps' trials, numbered from 1, refused ones with their reason; where they came from; what all share; where
    their recipe was audited).
    """
    import pandas as pd

    from escala.contract.errors import LawError
    from escala.laws.provenance import in_common

    found = [sweep_points(settings, name) for name in names]
    for name, each in zip(names, found, strict=True):
        if len(each.points) and each.points["loss_nats"].isna().any():
            raise LawError(
                f"the trials of {name} have no held-out loss", "a law is fitted to pretraining runs"
            )
    points = pd.concat([part for each in found for part in (each.points, each.refused)]).drop_duplicates(
        "trial"
    )
    points.index = pd.RangeIndex(1, len(points) + 1)
    if "trunk" in points:  # beside trials that were trained alone
        points["trunk"] = points["trunk"].fillna(points["trial"])
    sources, shared = [f"sweep {name}" for name in names], in_common([each.configuration for each in found])
    return points, sources, shared, [point for each in found for point in each.audited]
