"""Plans, proposals and explorations, and what a device does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from escala.client.home import Home
from escala.contract.errors import SpecError
from escala.report import Report, silent
from escala.views.jobs import JobView
from escala.views.plans import (
    ExplorationView,
    PlanView,
    PoolExplorationView,
    PoolProposalsView,
    PoolRowView,
    ProposalsView,
    TargetView,
)
from escala.views.workers import WorkersView

if TYPE_CHECKING:
    from escala.planning.limits import Limits
    from escala.planning.plans import PlanOptions
    from escala.schema.hardware import Cluster

PlanViewT = TypeVar("PlanViewT", bound=PlanView)


class PlanMethods(Home):
    """See the module."""

    def plan_law(self, reference: str, limits: Limits, options: PlanOptions | None = None) -> PlanView:
        """The best split of N and D (and T, and experts) under `limits`. Raises LawError, NotFoundError, SpecError."""
        from escala.planning import plans

        return PlanView.of_planned(
            plans.plan_law(self.settings, reference, limits, options or plans.PlanOptions())
        )

    def plan_front(
        self, reference: str, limits: Limits, options: PlanOptions | None = None, plot: Path | None = None
    ) -> list[PlanView]:
        """Plans for budgets from a hundredth to the whole of the one given, drawn into the PNG `plot`.

        Raises as `plan_law`.
        """
        from escala.planning import plans

        found = plans.plan_front(self.settings, reference, limits, options or plans.PlanOptions())
        if plot is not None:
            from escala.planning.plots import plot_front

            plot_front([each.plan for each in found], plot, found[0].law.reference)
        return [PlanView.of_planned(each) for each in found]

    def plan_kinds(
        self, reference: str, limits: Limits, kinds: Sequence[str], options: PlanOptions | None = None
    ) -> list[PlanView]:
        """The plan of each kind of attention under the same limits. As `planning.plans.plan_kinds`."""
        from escala.planning import plans

        found = plans.plan_kinds(self.settings, reference, limits, kinds, options or plans.PlanOptions())
        return [PlanView.of_planned(each) for each in found]

    def plan_target(self, reference: str, loss_nats: float, options: PlanOptions | None = None) -> TargetView:
        """The least compute that reaches a loss, its split, and its energy. Raises as `plan_law`."""
        from escala.planning import plans

        found = plans.plan_target(self.settings, reference, loss_nats, options or plans.PlanOptions())
        return TargetView.of_target(*found)

    def plan_workers(
        self, plan: PlanViewT, options: PlanOptions | None = None, max_workers: int | None = None
    ) -> PlanViewT:
        """The plan with what its run takes by the number of workers, up to `max_workers` (None: the cluster's devices),
        in the options' precision and in others; or why there is no such run. As `planning.plan_workers.plan_workers`.
        """
        from escala.planning import plan_workers, plans

        run = (plan.n_active, plan.n_total, plan.tokens, plan.context_tokens)
        options = options or plans.PlanOptions()
        try:
            found = plan_workers.plan_workers(self.settings, plan.law, *run, options, max_workers)
        except SpecError as error:
            return plan.model_copy(update={"workers_unknown": error.message})
        ends = (None if end is None else end / plan.tokens for end in (plan.tokens_low, plan.tokens_high))
        low, high = ends
        curves = tuple(WorkersView.of_curve(curve, low, high) for curve in found)
        return plan.model_copy(update={"workers": curves})

    def propose_runs(
        self,
        reference: str,
        target: Limits | Mapping[str, float],
        max_flops: float,
        options: PlanOptions | None = None,
        *,
        aim: str = "loss",
        count: int = 1,
        unit: str = "FLOP",
        width: float | None = None,
    ) -> ProposalsView:
        """The next runs: those that tell most of the target per cost. Args, errors: `planning.plans.propose_runs`."""
        from escala.planning import plans

        found = plans.propose_runs(
            self.settings,
            reference,
            target,
            max_flops,
            options or plans.PlanOptions(),
            aim=aim,
            count=count,
            unit=unit,
            width=width,
        )
        return ProposalsView.of_proposed(found)

    def propose_rows(
        self,
        reference: str,
        pool: Path,
        cost: str,
        *,
        targets: Path | None = None,
        target: Limits | None = None,
        options: PlanOptions | None = None,
        count: int = 1,
    ) -> PoolProposalsView:
        """The next rows of a pool for the rows of `targets`, or the plan of `target`. Raises LawError, NotFoundError,
        SpecError.
        """
        from escala.planning import plans

        stored, rows = plans.propose_rows(
            self.settings, reference, pool, cost, targets, target, options or plans.PlanOptions(), count
        )
        found = tuple(PoolRowView(row=k, cost=c, expected_error=e) for k, c, e in rows)
        return PoolProposalsView(law=stored.reference, healthy=stored.law.healthy, rows=found)

    def explore_pool(
        self, pool: Path, targets: Path, cost: str, budget: float, *, form: str = "nd", seed: int = 0
    ) -> PoolExplorationView:
        """Replay a table within a budget, without a law or a cluster. As `planning.pool_table.explore_pool`."""
        from escala.planning import pool_table

        found = pool_table.explore_pool(pool, targets, cost, budget, form=form, seed=seed)
        return PoolExplorationView.of_exploration(found, budget)

    def explore(
        self,
        reference: str,
        target: Limits,
        max_flops: float,
        budget_flops: float,
        options: PlanOptions | None = None,
        *,
        width: float = 0.02,
        batch: int = 2,
        report: Report = silent,
    ) -> Iterator[ExplorationView]:
        """Propose, run, refit, within a budget; the journal after every round. As `planning.explore.explore`."""
        from escala.planning import explore
        from escala.planning.plans import PlanOptions

        rounds = explore.explore(
            self.settings,
            reference,
            target,
            max_flops,
            budget_flops,
            options or PlanOptions(),
            width=width,
            batch=batch,
            report=report,
        )
        return map(ExplorationView.of_exploration, rounds)

    def bench_device(
        self,
        workers: int = 1,
        gpus_per_worker: int = 0,
        overrides: Mapping[str, Any] | None = None,
        report: Report = silent,
    ) -> JobView:
        """Queue the measurement of as many workers as the cluster has devices. Raises SpecError, ClusterError."""
        from escala.planning import bench

        return JobView.of(bench.bench_device(self.settings, workers, gpus_per_worker, overrides, report))

    def write_cluster(self, name: str, path: Path) -> Cluster:
        """Write the cluster's file from what the bench job measured. Errors as `planning.bench.write_cluster`."""
        from escala.planning import bench

        return bench.write_cluster(self.settings, name, path)

    def bench_attention(self, overrides: Mapping[str, Any] | None = None, report: Report = silent) -> JobView:
        """Queue the measurement of each kind of attention. Errors as `bench_device`.

        Args:
            overrides: fields of AttentionBenchConfig.
        """
        from escala.planning import bench_attention

        return JobView.of(bench_attention.bench_attention(self.settings, overrides, report))

    def write_attention(self, name: str, path: Path) -> Cluster:
        """Write into the cluster's file what that job measured, and where each kind overtakes exact. Errors as
        `planning.bench_attention.write_attention`.
        """
        from escala.planning import bench_attention

        return bench_attention.write_attention(self.settings, name, path)

    def check_bench_file(self, path: Path) -> None:
        """Raise SpecError or NotFoundError where `write_attention` could not write into `path`."""
        from escala.planning import bench_attention

        bench_attention.check_file(path)
