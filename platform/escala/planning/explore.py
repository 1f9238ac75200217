"""`escala explore`: propose, run, refit, again and again within a hard budget. Resumable: every round is on disk.

A round is a sweep of the proposed runs, which are configured like the law's own; its points join the law's, and the
next version of the law is fitted. What was expected and what was obtained stay side by side in the journal.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from escala import documents
from escala.contract.errors import LawError, SpecError, StateError
from escala.contract.records import check_format, read_json, write_json
from escala.jobs import actions as jobs
from escala.laws import queries as laws
from escala.planning.law_runs import base_of
from escala.planning.limits import Limits
from escala.planning.plans import PlanOptions, ask, propose_runs
from escala.planning.propose import Proposal
from escala.report import Report, silent
from escala.settings import Settings
from escala.sweeps import launch as sweeps

LOOKS = 2  # narrow intervals in a row that end a search: the first one of many looks may be narrow by luck
GIVE_UP = 3  # rounds without a single point


@dataclass(frozen=True)
class Round:
    """What was asked of one round, and what came of it; None until it has."""

    law: str  # that proposed
    proposals: list[dict[str, Any]]
    key: str | None = (
        None  # under which its sweep is submitted: once, also where this process is killed in between
    )
    job_id: str | None = None  # the sweep's
    spent_flops: float | None = None  # by all its trials, refused ones too
    points: int | None = None
    obtained: list[dict[str, Any]] | None = None  # predicted and measured loss of each point
    refused: list[dict[str, Any]] | None = None
    fitted: str | None = None  # the law after it
    width_obtained: float | None = None  # where proposals[-1]["width_expected"] was expected


@dataclass(frozen=True)
class Exploration:
    """The journal: what is wanted, and the rounds so far."""

    name: str
    law: str  # the first one
    target: Limits  # whose optimum is to be known better
    max_flops: float  # of one run
    budget_flops: float  # of all of them
    width: float  # relative, of the 90 % interval of the mean loss at the target
    batch: int
    rounds: list[Round] = field(default_factory=list)
    options: PlanOptions = field(default_factory=PlanOptions)

    @property
    def spent_flops(self) -> float:
        """By all rounds that have ended."""
        return sum(r.spent_flops or 0.0 for r in self.rounds)


def explore(
    settings: Settings,
    reference: str,
    target: Limits,
    max_flops: float,
    budget_flops: float,
    options: PlanOptions = PlanOptions(),
    *,
    width: float = 0.02,
    batch: int = 2,
    report: Report = silent,
) -> Iterator[Exploration]:
    """Explore until the interval at the target is `width` after `LOOKS` rounds in a row, or the next run does not fit
    in the budget. Yields the journal after every round.

    `target`: limits, whose optimum (that of `plans.plan_law`) is to be known better.

    The journal of this law, target and budget is continued where it was left: a round that runs is waited for, none
    is run twice. The budget is hard: a proposal whose FLOPs do not fit in what is left is not run.

    Raises LawError, SpecError, StateError where a sweep fails, ClusterError.
    """
    stored = laws.law(settings, reference)
    if not base_of(stored):
        raise SpecError(
            f"{stored.reference} was fitted to a table: it does not know how its runs were configured",
            "explore a law of sweeps: escala laws fit --sweep SPACE --name NAME",
        )
    options = replace(options, refresh=False)
    asked = Exploration(stored.name, stored.reference, target, max_flops, budget_flops, width, batch)
    state = _open(settings, replace(asked, options=options))
    while True:
        if state.rounds and state.rounds[-1].fitted is None:
            state = _save(
                settings,
                replace(
                    state, rounds=[*state.rounds[:-1], _finish(settings, state, state.rounds[-1], report)]
                ),
            )
            yield state
        following = _next(settings, state, report)
        if following is None:
            return
        state = _save(settings, replace(state, rounds=[*state.rounds, following]))


def _open(settings: Settings, asked: Exploration) -> Exploration:
    """The journal of this question, or a new one. What is asked of it (batch, width) may change, its budget too."""
    path = _path(settings, asked.name)
    if not path.exists():
        return _save(settings, asked)
    try:
        data = read_json(path)
        check_format(data, str(path))
        data = _of_today(data)
        law, rounds = data["law"], [Round(**each) for each in data["rounds"]]
        target, options = Limits(**data["target"]), PlanOptions(**data["options"])
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise StateError(
            f"{path} is damaged ({error})", "restore it, or move it away: the exploration then starts again"
        ) from error
    if (target, options) != (asked.target, asked.options):
        raise StateError(
            f"{asked.name} is explored for another target: {_stated(target, options)}",
            f"continue with that target, or move {path} away",
        )
    return _save(settings, replace(asked, law=law, rounds=rounds))


def _of_today(data: dict[str, Any]) -> dict[str, Any]:
    """A journal of escala 0.1, which knew a target in FLOPs alone, as one of today."""
    if "target_flops" in data:
        target = {"compute_flops": data.pop("target_flops")}
        return {**data, "target": target, "options": {}}
    return data


def _stated(*records: Limits | PlanOptions) -> str:
    """The fields that are not their defaults."""
    given = [
        (f.name, getattr(r, f.name)) for r in records for f in fields(r) if getattr(r, f.name) != f.default
    ]
    return ", ".join(
        f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}" for name, value in given
    )


def _save(settings: Settings, state: Exploration) -> Exploration:
    path = _path(settings, state.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, state)
    return state


def _path(settings: Settings, name: str) -> Path:
    return settings.home / "explore" / f"{name}.json"


def _next(settings: Settings, state: Exploration, report: Report) -> Round | None:
    """The next round; None where the width is reached, the budget is spent or nothing comes of the runs."""
    law = state.rounds[-1].fitted if state.rounds else state.law
    if law is None:
        return None
    if len(state.rounds) >= GIVE_UP and not any(r.points for r in state.rounds[-GIVE_UP:]):
        raise StateError(
            f"the last {GIVE_UP} rounds gave no point",
            f"`escala logs {state.rounds[-1].job_id}` and {_path(settings, state.name)} say why",
        )
    left = state.budget_flops - state.spent_flops
    smallest = laws.law(settings, law).law.ranges.get("compute_flops", (0.0,))[0]
    now = width_at(settings, law, state.target, state.options)
    report(f"{law}: the interval of the mean loss at {_stated(state.target)} is {now:.2%} wide")
    if _is_reached([r.width_obtained for r in state.rounds[-LOOKS:-1]], now, state):
        return None
    if now <= state.width:
        report(
            "narrow once: one more round confirms it, since a search may stop on a narrow interval by luck"
        )
    if left < smallest:
        report(f"{left:.3g} FLOPs are left, less than the law's smallest run")
        return None

    def proposals(most_flops: float) -> list[Proposal]:
        found = propose_runs(
            settings, law, state.target, most_flops, state.options, count=state.batch, width=state.width
        )
        return list(found.proposals)

    try:
        chosen = fitting(
            proposals,
            partial(_planned_flops, settings, state, law),
            left,
            min(state.max_flops, left),
            smallest,
            report,
        )
    except LawError as error:
        report(f"no further run within the {left:.3g} FLOPs that are left: {error.message}")
        return None
    return Round(law, [asdict(p) for p in chosen], key=f"explore-{uuid.uuid4().hex}") if chosen else None


def _is_reached(before: Sequence[float | None], now: float, state: Exploration) -> bool:
    """Whether the width is wanted no narrower: by the last `LOOKS` intervals in a row. A law that has not been explored
    was looked at once, and not chosen for its width: one interval is enough.
    """
    if not state.rounds:
        return now <= state.width
    looks = [width is not None and width <= state.width for width in before]
    return len(looks) == LOOKS - 1 and all(looks) and now <= state.width


def fitting(
    ask: Callable[[float], list[Proposal]],
    planned: Callable[[list[Proposal]], float],
    left: float,
    most: float,
    least: float,
    report: Report = silent,
) -> list[Proposal]:
    """The proposals whose planned FLOPs fit in `left`: the first ones of a batch, else smaller runs.

    A proposal counts 6 N D, its plan attention and whole steps too. So where a single run does not fit, `ask` is
    asked again for runs so much smaller; none is left once they would be below `least`, the law's smallest run.

    Args:
        ask: the proposals, best first, of at most so many FLOPs (6 N D) each.
        planned: what runs take as they will be configured.
        most: FLOPs (6 N D) of one run, to begin with.
    """
    while most >= least:
        chosen = ask(most)
        while (flops := planned(chosen)) > left and len(chosen) > 1:
            report(f"{len(chosen)} runs of {flops:.3g} FLOPs do not fit in the {left:.3g} that are left")
            chosen = chosen[:-1]
        if flops <= left:
            return chosen
        report(f"a run of {flops:.3g} FLOPs does not fit in the {left:.3g} that are left: a smaller one")
        most = chosen[0].compute_flops * left / flops
    report(
        f"no run of {least:.3g} FLOPs or more, as the law's smallest, fits in the {left:.3g} that are left"
    )
    return []


def _job_name(state: Exploration) -> str:
    return f"explore-{state.name}"


def _planned_flops(settings: Settings, state: Exploration, law: str, chosen: list[Proposal]) -> float:
    """What the runs take as they will be configured: the shape near N, whole steps, attention."""
    space = _write_space(settings, state, law, [asdict(p) for p in chosen])
    return sweeps.plan_sweep(settings, str(space), options={"name": _job_name(state)}).compute_flops


def _finish(settings: Settings, state: Exploration, current: Round, report: Report) -> Round:
    """Start the round's sweep where it has none, wait for it, fit."""
    if current.job_id is None:
        space = _write_space(settings, state, current.law, current.proposals)
        left = state.budget_flops - state.spent_flops
        options = {"name": _job_name(state), "max_flops": left, "idempotency_key": current.key}
        current = replace(current, job_id=sweeps.sweep(settings, str(space), (), options, report=report).id)
        _save(settings, replace(state, rounds=[*state.rounds[:-1], current]))
    *_, last = jobs.watch(settings, str(current.job_id))
    if last.job.state not in ("succeeded", "stopped"):
        raise StateError(
            f"the sweep {current.job_id} of this round is {last.job.state}",
            f"escala jobs retry {current.job_id}, then explore again: it goes on from here",
        )
    return _fit(settings, state, current)


def _write_space(settings: Settings, state: Exploration, law: str, proposals: list[dict[str, Any]]) -> Path:
    """The round as a sweep's space: the proposed N and D, configured like the law's runs."""
    base = base_of(laws.law(settings, law))
    axes = ["n_total", "tokens"]
    if "context_tokens" not in base.get("training", {}):  # a law of T
        axes += ["context_tokens"] if proposals[0].get("context_tokens") else []
    cells = [{name: p[name] for name in axes} for p in proposals]
    space = {"aim": "law", "design": "grid", "cells": cells, "base": base}
    path = _path(settings, state.name).with_name(f"{state.name}-round.yaml")
    path.write_text(documents.dump(space))
    return path


def _fit(settings: Settings, state: Exploration, current: Round) -> Round:
    """The law of all points so far, and how the round's expectations fared."""
    import pandas as pd

    before = laws.law(settings, current.law)
    found = sweeps.sweep_points(settings, str(current.job_id))
    spent = sum(float(f["compute_flops"] or 0) for f in [*_rows(found.points), *_rows(found.refused)])
    refused = [{"name": r.get("name"), "reason": r["reason"]} for r in _rows(found.refused)]
    fitted, obtained = current.law, []
    if len(found.points):
        obtained = [_compared(before.law, row) for row in _rows(found.points)]
        points = pd.concat([before.law.points, found.points], ignore_index=True).drop_duplicates("trial")
        asked = {k: before.law.settings[k] for k in ("bootstrap", "group", "seed", "priors")}
        configuration = before.provenance.get("configuration")
        sources = [before.reference, f"sweep {current.job_id}"]
        stored = laws.fit_points(
            settings,
            points,
            state.name,
            sources=sources,
            form=before.law.form_name,
            size=before.law.size,
            configuration=configuration,
            stated=before.provenance.get("stated") or (),
            **asked,
        )
        fitted = stored.stored.reference
    return replace(
        current,
        spent_flops=spent,
        points=len(found.points),
        obtained=obtained,
        refused=refused,
        fitted=fitted,
        width_obtained=_width(settings, fitted, state),
    )


def _width(settings: Settings, law: str, state: Exploration) -> float | None:
    """`width_at`; None where the law has no interval or no optimum there."""
    try:
        return width_at(settings, law, state.target, state.options)
    except LawError:
        return None


def _rows(table: Any) -> list[dict[str, Any]]:
    return [] if table.empty else table.to_dict("records")


def _compared(law: Any, row: dict[str, Any]) -> dict[str, Any]:
    point = {
        name: float(row[name])
        for name in ("n_active", "n_total", "tokens", "context_tokens")
        if row.get(name)
    }
    said = law.predict(0.9, **point)
    return {
        **point,
        "run_id": row.get("run_id"),
        "predicted": said.loss_nats,
        "low": said.low_nats,
        "high": said.high_nats,
        "obtained": float(row["loss_nats"]),
    }


def width_at(
    settings: Settings, reference: str, target: Limits, options: PlanOptions = PlanOptions()
) -> float:
    """Relative width of the 90 % interval of the mean loss at the plan for `target`. Raises LawError."""
    stored = laws.law(settings, reference)
    plan = ask(settings, stored, target, options).answer().plan
    found = stored.law.predict_mean(0.9, **plan.point(stored.law.size))
    if found.low_nats is None or found.high_nats is None:
        raise LawError(
            f"{reference} has no intervals, so there is no width to narrow.",
            f"`escala laws show {reference}` says why; fit it with `escala laws fit --bootstrap 1000` to more runs.",
        )
    return (found.high_nats - found.low_nats) / found.loss_nats
