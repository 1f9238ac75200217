"""Jobs: what they would cost, queued, watched, stopped, continued; their checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from escala.client.home import Home
from escala.report import Report, silent
from escala.views.cluster import CheckpointView, GarbageView
from escala.views.jobs import JobDetailsView, JobView, WatchedJobView

if TYPE_CHECKING:
    from escala.schema.compression import Precision
    from escala.views.costs import CostView, ResolvedSpecView


class JobMethods(Home):
    """See the module."""

    def resolve(
        self,
        workload: str,
        files: Iterable[str | Path] = (),
        overrides: Iterable[str] = (),
        options: Mapping[str, Any] | None = None,
        compute_flops: float | None = None,
        law: str | None = None,
        code: str | Path | None = None,
        cluster: str | Path | None = None,
        max_workers: int | None = None,
    ) -> ResolvedSpecView:
        """The spec in full and what it costs on a cluster; starts nothing. Args and errors as `submit` and `cost`."""
        from escala.hardware import load_cluster
        from escala.planning import submission
        from escala.planning.cost import cost
        from escala.planning.workers import workers_curve
        from escala.views.costs import CostView, ResolvedSpecView

        asked = submission.JobRequest(
            workload, files, overrides, options or {}, compute_flops, law, None, code, cluster=cluster
        )
        answer = submission.resolve(self.settings, asked)
        loaded = load_cluster(cluster or self.settings.cluster)
        config = answer.spec.trained
        price = CostView.of_cost(cost(config, loaded), loaded, workers_curve(config, loaded, max_workers))
        return ResolvedSpecView.of_resolved(answer, price)

    def cost(
        self,
        files: Iterable[str | Path] = (),
        overrides: Iterable[str] = (),
        compute_flops: float | None = None,
        cluster: str | Path | None = None,
        max_workers: int | None = None,
    ) -> CostView:
        """What a pretraining run costs on a cluster: a name in clusters/, or a file; None: ESCALA_CLUSTER. And how many
        workers pay, of up to `max_workers`; None: of the cluster's devices.

        Raises NotFoundError, SpecError.
        """
        return self.resolve(
            "pretrain",
            files,
            overrides,
            compute_flops=compute_flops,
            cluster=cluster,
            max_workers=max_workers,
        ).cost

    def submit(
        self,
        workload: str,
        files: Iterable[str | Path] = (),
        overrides: Iterable[str] = (),
        options: Mapping[str, Any] | None = None,
        report: Report = silent,
        compute_flops: float | None = None,
        law: str | None = None,
        base: Mapping[str, Any] | None = None,
        code: str | Path | None = None,
        seal: bool = False,
    ) -> JobView:
        """Queue a job. Args as `planning.submission.JobRequest`, errors as `planning.submission.submit`."""
        from escala.planning import submission

        asked = submission.JobRequest(
            workload, files, overrides, options or {}, compute_flops, law, base, code, seal
        )
        return JobView.of(submission.submit(self.settings, asked, report))

    def compress(
        self,
        model: str,
        asked: Mapping[str, Any] | None = None,
        overrides: Iterable[str] = (),
        options: Mapping[str, Any] | None = None,
        report: Report = silent,
    ) -> JobView:
        """Queue the compression of a model. Args and errors as `jobs.compress.compress`."""
        from escala.jobs import compress

        return JobView.of(compress.compress(self.settings, model, asked, overrides, options, report))

    def submit_run(
        self,
        law: str,
        n_active: float,
        n_total: float,
        tokens: float,
        overrides: Iterable[str] = (),
        report: Report = silent,
        context_tokens: float | None = None,
    ) -> JobView:
        """Queue a run of N and D (and T, of a law of it) configured like the law's runs, its forecast sealed. Errors as
        `planning.submission.submit_run`.
        """
        from escala.planning import submission

        return JobView.of(
            submission.submit_run(
                self.settings, law, n_active, n_total, tokens, overrides, report, context_tokens
            )
        )

    def jobs(self, everything: bool = False, limit: int | None = None) -> list[JobView]:
        """Jobs that run, then those that wait, in order; with `everything`, all, newest first. Raises SpecError."""
        from escala.jobs import actions

        return [JobView.of(each) for each in actions.jobs(self.settings, everything, limit)]

    def job(self, name: str) -> JobDetailsView:
        """One job in full, by its id, the start of it, or its name. Raises NotFoundError."""
        from escala.jobs import actions

        return JobDetailsView.of(actions.job(self.settings, name))

    def stop(self, name: str) -> JobView:
        """Ask a job to write a checkpoint and end. Raises NotFoundError, StateError."""
        from escala.jobs import actions

        return JobView.of(actions.stop(self.settings, name))

    def retry(self, name: str, report: Report = silent) -> JobView:
        """Queue a failed or stopped job again. Errors as `jobs.actions.retry`."""
        from escala.jobs import actions

        return JobView.of(actions.retry(self.settings, name, report))

    def resume(
        self,
        name: str,
        overrides: Iterable[str] = (),
        report: Report = silent,
        idempotency_key: str | None = None,
    ) -> JobView:
        """A new job that starts from another one's last good checkpoint. Errors as `jobs.actions.resume`."""
        from escala.jobs import actions

        return JobView.of(actions.resume(self.settings, name, overrides, report, idempotency_key))

    def logs(self, name: str, follow: bool = False) -> Iterator[str]:
        """The lines of a job's output, attempt after attempt; with `follow`, until it ends. Raises NotFoundError."""
        from escala.jobs import actions

        return actions.logs(self.settings, name, follow)

    def watch(self, name: str) -> Iterator[WatchedJobView]:
        """The job's state and progress, again and again, until it has ended. Errors as `jobs.actions.watch`."""
        from escala.jobs import actions

        return map(WatchedJobView.of, actions.watch(self.settings, name))

    def export(self, name: str, to: Path, adapter: bool = False, gguf: Precision | None = None) -> Path:
        """Write the newest checkpoint of a run or a job into `to`. Errors as `jobs.export.export`."""
        from escala.jobs.export import export

        return export(self.settings, name, to, adapter, gguf)

    def collect_garbage(
        self, name: str | None = None, keep: int | None = None, delete: bool = False
    ) -> GarbageView:
        """The checkpoints beyond each job's retention rule, freed with `delete`. Errors as in `jobs.retention`."""
        from escala.jobs import retention

        found = retention.collect_garbage(self.settings, name, keep, delete)
        checkpoints = tuple(CheckpointView(path=path, size_bytes=size) for path, size in found.checkpoints)
        return GarbageView(checkpoints=checkpoints, damaged=tuple(found.damaged), deleted=delete)
