"""Which runs to make: a plan, proposals, an exploration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from escala.views.base import View
from escala.views.laws import LawAnswerView, about
from escala.views.workers import WorkersView

if TYPE_CHECKING:
    from escala.planning.explore import Exploration, Round
    from escala.planning.plan import Target
    from escala.planning.plans import Planned, Proposed
    from escala.planning.pool_table import PoolExploration
    from escala.planning.propose import Proposal

SECONDS_PER_HOUR, JOULES_PER_KWH = 3600.0, 3.6e6


class SplitView(View):
    """A budget spent: N, D, T, and the loss that the law predicts, with its 90 % predictive interval."""

    n_active: float
    n_total: float
    tokens: float
    tokens_per_parameter: float  # active ones
    context_tokens: float | None
    loss_nats: float
    low_nats: float | None
    high_nats: float | None
    compute_flops: float  # training


class PlanView(LawAnswerView, SplitView):
    """The best split of a budget. Intervals are at 90 %: of the loss predictive, of N, D and T over the replicates.
    Time is of training; money and energy include inference demand, None where the speed cannot tell.
    """

    n_active_low: float | None
    n_active_high: float | None
    tokens_low: float | None
    tokens_high: float | None
    context_tokens_low: float | None  # of T, where it was chosen
    context_tokens_high: float | None
    inference_flops: float
    effective_tokens: float  # what repeated tokens are worth
    epochs: float
    attention: str | None  # the kind that the planned model has; None: attention was not counted
    chi: float
    memory_bytes: float | None  # of a device in training, where its memory is a limit
    state_bytes: float | None  # what generation keeps of a sequence of that context
    wall_seconds: float | None
    cost_usd: float | None
    energy_joules: float | None
    binding: tuple[str, ...]
    residuals: dict[str, float]
    advice: tuple[str, ...]
    front: tuple[PlanView, ...] | None = None  # of smaller budgets, where they were asked for
    front_plot: str | None = None  # the PNG that shows them
    kinds: tuple[PlanView, ...] | None = None  # of other kinds of attention, where they were asked for
    workers: tuple[WorkersView, ...] | None = (
        None  # of the run, where there is a cluster: in the plan's precision, others
    )
    workers_unknown: str | None = None  # why there are none

    @classmethod
    def of_planned(cls, found: Planned) -> PlanView:
        """Of a plan with its law."""
        return cls(**_plan(found))


class TargetView(PlanView):
    """The least compute that reaches a loss, its split, and the 90 % intervals of compute and energy."""

    compute_low_flops: float | None
    compute_high_flops: float | None
    energy_low_joules: float | None
    energy_high_joules: float | None
    reached: float | None  # the share of replicates that reach the loss at all

    @classmethod
    def of_target(cls, found: Planned, target: Target) -> TargetView:
        """Of a plan and the target that it reaches. Joules per token times D* (docs/theory E.5)."""
        best = found.plan
        low, high = (_joules(best.kwh, best.tokens, t) for t in (best.tokens_low, best.tokens_high))
        return cls(
            **_plan(found),
            compute_low_flops=target.compute_low_flops,
            compute_high_flops=target.compute_high_flops,
            energy_low_joules=low,
            energy_high_joules=high,
            reached=target.reached,
        )


class ProposalView(View):
    """A run to make. Widths are relative, of the 90 % interval at the target, `width_expected` after this run and those
    before it; `loss_nats` is what the law predicts of it.
    """

    n_active: float
    n_total: float
    tokens: float
    context_tokens: float | None
    compute_flops: float
    cost: float  # in `unit`
    unit: str
    width_now: float
    width_expected: float
    information_nats: float
    information_per_cost: float
    loss_nats: float
    low_nats: float | None
    high_nats: float | None

    @classmethod
    def of_proposal(cls, found: Proposal | Mapping[str, Any]) -> ProposalView:
        """Of a proposal, or of one in an exploration's journal."""
        fields = dict(found) if isinstance(found, Mapping) else asdict(found)
        return cls(loss_nats=fields.pop("predicted_loss_nats"), **fields)


class ProposalsView(View):
    """Runs to make next, best first, and the law that asked for them. `target`: the plan that they make better known;
    None where they were asked for a point.
    """

    law: str  # name@version
    healthy: bool
    method: str
    target: SplitView | None
    proposals: tuple[ProposalView, ...]

    @classmethod
    def of_proposed(cls, found: Proposed) -> ProposalsView:
        """Of proposals with their law."""
        proposals = tuple(ProposalView.of_proposal(each) for each in found.proposals)
        target = None if found.plan is None else SplitView.of(found.plan)
        known = {"law": found.law.reference, "healthy": found.law.law.healthy, "method": found.method}
        return cls(**known, target=target, proposals=proposals)


class PoolLawView(View):
    """The law of the rows of a pool. Parameters are those of the formula in nats, parameters, tokens."""

    form: str
    formula: str
    size: str
    parameters: dict[str, float]
    points: int
    findings: tuple[str, ...]


class PoolExplorationView(View):
    """Rows bought from a pool, in order, and the law of them. Rows count from 0, without the header."""

    chosen: tuple[int, ...]
    spent: float  # in the unit of the cost column
    budget: float
    law: PoolLawView
    predictions: tuple[float, ...]  # loss of each target row, nats
    refused: tuple[int, ...]  # chosen rows without a usable loss
    expected_error: float  # relative, root mean square over the targets, by the plan's own model
    seed: int

    @classmethod
    def of_exploration(cls, found: PoolExploration, budget: float) -> PoolExplorationView:
        """Of what was bought."""
        bought = found.purchase
        law = PoolLawView(
            form=found.form.name,
            formula=found.form.formula,
            size=found.size,
            parameters=found.parameters,
            points=len(bought.rows) - len(found.refused),
            findings=found.findings,
        )
        names = ("predictions", "refused", "expected_error", "seed")
        known = {name: getattr(found, name) for name in names}
        return cls(chosen=bought.rows, spent=bought.spent, budget=budget, law=law, **known)


class PoolRowView(View):
    """A row of a pool to buy next; `expected_error` after it and those before it, relative, at the targets."""

    row: int  # from 0, without the header
    cost: float
    expected_error: float


class PoolProposalsView(View):
    """Rows of a pool to buy next, best first, and the law that asked for them."""

    law: str  # name@version
    healthy: bool
    rows: tuple[PoolRowView, ...]


class ObtainedView(View):
    """A run of a round: what the law predicted of it, and what it obtained."""

    run_id: str | None
    n_active: float | None = None
    n_total: float | None = None
    tokens: float | None = None
    context_tokens: float | None = None
    loss_nats: float
    low_nats: float | None
    high_nats: float | None
    obtained_loss_nats: float

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> ObtainedView:
        """Of a row of an exploration's journal."""
        names = {
            "predicted": "loss_nats",
            "low": "low_nats",
            "high": "high_nats",
            "obtained": "obtained_loss_nats",
        }
        return cls(**{names.get(name, name): value for name, value in row.items()})


class RefusedRunView(View):
    """A run of a round that gave no point."""

    name: str | None
    reason: str


class RoundView(View):
    """What was asked of one round, and what came of it; None until it has."""

    law: str  # that proposed
    proposals: tuple[ProposalView, ...]
    key: str | None  # under which its sweep is submitted
    job_id: str | None
    spent_flops: float | None
    points: int | None
    obtained: tuple[ObtainedView, ...] | None
    refused: tuple[RefusedRunView, ...] | None
    fitted: str | None  # the law after it
    width_obtained: float | None

    @classmethod
    def of_round(cls, found: Round) -> RoundView:
        """Of a round of the journal."""
        obtained = found.obtained
        return cls(
            **{name: getattr(found, name) for name in ("law", "key", "job_id", "spent_flops", "points")},
            **{name: getattr(found, name) for name in ("refused", "fitted", "width_obtained")},
            proposals=tuple(ProposalView.of_proposal(each) for each in found.proposals),
            obtained=None if obtained is None else tuple(ObtainedView.of_row(row) for row in obtained),
        )


class ExplorationView(View):
    """The journal of an exploration: what is wanted, and the rounds so far."""

    name: str
    law: str  # the first one
    target: dict[str, Any]  # limits, whose optimum is to be known better
    options: dict[str, Any]  # of the plan
    max_flops: float  # of one run
    budget_flops: float  # of all of them
    spent_flops: float
    width: float  # relative, of the 90 % interval of the mean loss at the target
    batch: int
    rounds: tuple[RoundView, ...]

    @classmethod
    def of_exploration(cls, found: Exploration) -> ExplorationView:
        """Of a journal."""
        names = ("name", "law", "max_flops", "budget_flops", "spent_flops", "width", "batch")
        asked = {"target": asdict(found.target), "options": asdict(found.options)}
        rounds = tuple(RoundView.of_round(each) for each in found.rounds)
        return cls(**{name: getattr(found, name) for name in names}, **asked, rounds=rounds)


def _plan(found: Planned) -> dict[str, Any]:
    best = found.plan
    fields = asdict(best)
    hours, usd, kwh, extrapolation = (fields.pop(name) for name in ("hours", "usd", "kwh", "extrapolation"))
    return {
        **fields,
        **about(found.law, extrapolation, found.assumed),
        **{name: getattr(found, name) for name in ("attention", "memory_bytes", "state_bytes")},
        "tokens_per_parameter": best.tokens_per_parameter,
        "wall_seconds": None if hours is None else hours * SECONDS_PER_HOUR,
        "cost_usd": usd,
        "energy_joules": None if kwh is None else kwh * JOULES_PER_KWH,
    }


def _joules(kwh: float | None, tokens: float, other_tokens: float | None) -> float | None:
    """The energy of `other_tokens` where that of `tokens` is known."""
    if kwh is None or other_tokens is None:
        return None
    return kwh * JOULES_PER_KWH / tokens * other_tokens
