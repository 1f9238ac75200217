"""A sweep's driver: `python -m escala.sweeps.tuner ATTEMPT.json`. Ray Tune runs the trials; all else is in files.

Killed at any moment and started again it repeats no finished trial: what there is to do follows from the trials'
own directories, and Tune only keeps the cluster full. Retries are ours (`trials.FINAL`), so Tune's experiment
state is never read back.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from escala import spec
from escala.contract import failures
from escala.contract.attempt import stop_on_sigterm
from escala.contract.errors import EscalaError, SpecError
from escala.contract.failures import Failure
from escala.contract.records import AttemptFiles, AttemptSpec, Control, Outcome, TrialFiles, read_record
from escala.contract.redaction import hide
from escala.schema.workloads import get_workload, objective_of
from escala.sweeps import design, plan, trials
from escala.sweeps.monitor import Monitor
from escala.sweeps.points import read_points
from escala.sweeps.space import Range, Space
from escala.sweeps.trials import PlannedTrial
from escala.tracking.lineage import fingerprint
from escala.tracking.lineage.datasets import dataset_of
from escala.tracking.lineage.lifecycle import LiveAttempt, RunSummary, run_attempt

TRIAL_MODULE = "workloads.trial"  # runs on the cluster; the control plane knows it by name
CRASHES = 2  # of a trial's process, before the trial is given up
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files that nobody reads
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no loss
    "RAY_AIR_NEW_OUTPUT": "0",
}
Data = Mapping[str, Any]  # data_key -> what workloads.trial.prepare gave, with its fingerprints
OBJECTIVE = "objective"  # Tune's name of what a search minimises


def main(arguments: list[str]) -> int:
    """Run one attempt of a sweep; returns the process's exit code."""
    return run_attempt(arguments, run_sweep, classify, sweep_summary)


def run_sweep(attempt: LiveAttempt) -> None:
    """Data, trials, Tune. Raises what goes wrong with the sweep itself; a trial's trouble stays its own."""
    import ray

    space: Space = attempt.open(lambda plain: spec.validate(Space, plain, "the sweep's space"))
    os.environ.update(TUNE_ENVIRONMENT)
    ray.init(address="auto", log_to_driver=False, namespace="escala")  # each trial has a log of its own
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    stop_on_sigterm(attempt.files)
    sweep = Sweep(attempt)
    planned, data = sweep.plan(space)
    total = space.points if space.design == "optuna" else None
    monitor = Monitor(attempt.spec, sweep.home, planned, total)
    attempt.summarise = partial(sweep_summary, monitor=monitor)
    sweep.tune(space, planned, data, monitor)
    monitor.close()
    attempt.outcome = sweep.ending()


def home_of(attempt: LiveAttempt) -> Path:
    """The home that a job's attempt is in."""
    return attempt.files.directory.parents[2]


def classify(error: BaseException) -> Failure:
    """What went wrong with the sweep: Ray's own errors mean that it was lost, and is tried again."""
    import ray.exceptions

    lost = isinstance(error, ray.exceptions.RayError | ConnectionError)
    if lost and not isinstance(error, EscalaError):  # Ray raises errors that are of both
        return Failure("worker_lost", hide(f"{type(error).__name__}: {error}"))
    return failures.classify(error)


def sweep_summary(attempt: LiveAttempt, monitor: Monitor | None = None) -> RunSummary:
    """What the trials have spent, and the points so far."""
    spent = monitor.spent() if monitor else None
    found = read_points(home_of(attempt), attempt.spec.job_id)
    values = {
        "attempt_tokens": spent.train_tokens if spent else None,
        "attempt_flops": spent.compute_flops if spent else None,
        "wall_seconds": time.time() - attempt.started_at,
    }
    texts = {
        "points.csv": found.points.to_csv(index=False),
        "refused.csv": found.refused.to_csv(index=False),
    }
    return RunSummary(values, found.summary(), texts=texts)


class Sweep:
    """One attempt at a sweep."""

    def __init__(self, attempt: LiveAttempt) -> None:
        self.attempt, self.files = attempt.spec, attempt.files
        self.home = home_of(attempt)
        self.tracker, self.run_id = attempt.run

    def plan(self, space: Space) -> tuple[list[PlannedTrial], Data]:
        """The sweep's trials (those of its first attempt, if this is not that), and the data that they read."""
        planned = trials.read_planned(self.home, self.attempt.job_id)
        todo = [p.trial for p in planned] if planned or space.design == "optuna" else design.plan(space)
        configs = [t.config for t in todo] or [design.middle(space).config]
        data = {}
        print("preparing the data", flush=True)
        for config in configs:
            key = data_key(space.workload, config)
            if key not in data:
                data[key] = _prepare_on_cluster(_preparation(self.attempt, space.workload, config))
                self.tracker.dataset(self.run_id, dataset_of(config, data[key].fingerprints))
        if not planned:
            planned = [
                identify(n, t, data[data_key(space.workload, t.config)].fingerprints)
                for n, t in enumerate(todo, 1)
            ]
            if planned:
                trials.write_planned(self.home, self.attempt.job_id, planned)
        return planned, data

    def tune(self, space: Space, planned: list[PlannedTrial], data: Data, monitor: Monitor) -> None:
        """Run the trials that are not finished, as many at once as the cluster holds."""
        import ray
        from ray import tune
        from ray.tune import FailureConfig, RunConfig, TuneConfig

        pending = [p for p in planned if trials.finished(TrialFiles(self.home, p.fingerprint)) is None]
        if space.design != "optuna":
            done = len(planned) - len(pending)
            print(f"{len(planned)} trials, {done} of them finished before", flush=True)
            if not pending:
                return
        examples = [design.middle(space)] if space.design == "optuna" else [p.trial for p in pending]
        at_once = plan.fitting(space.workload, examples, ray.cluster_resources(), space.concurrency)
        print(f"{at_once} trials at once", flush=True)
        train = partial(train_trial, sweep=self.attempt, home=str(self.home), space=space, data=dict(data))
        trainable = tune.with_resources(train, resources_of(space.workload, examples))
        search: dict[str, Any] = {}
        param_space: dict[str, Any] = {"numbers": tune.grid_search(trials.by_trunk(pending))}
        if space.design == "optuna":
            search = {"search_alg": _optuna(space), "num_samples": space.points}
            param_space = {}
        if space.aim == "search":
            search |= {"metric": OBJECTIVE, "mode": "min", "scheduler": _scheduler(space)}
        tuner = tune.Tuner(
            trainable,
            param_space=param_space,
            tune_config=TuneConfig(
                max_concurrent_trials=at_once,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
                reuse_actors=space.early_stopping is None,  # ASHA ends a trial by ending its process
                **search,
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=str(self.files.directory),
                failure_config=FailureConfig(max_failures=CRASHES),
                callbacks=[monitor.callback()],
                verbose=0,
            ),
        )
        for error in tuner.fit().errors:
            print(f"a trial's process failed: {error}", file=sys.stderr, flush=True)

    def ending(self) -> Outcome:
        """Every trial has been tried; or the sweep was asked to stop."""
        control = read_record(Control, self.files.control)
        if control is not None:
            return Outcome(control.stop, "stopped before all trials were finished")
        found = read_points(self.home, self.attempt.job_id)
        if found.points.empty:
            reason = found.refused["reason"].iloc[0] if len(found.refused) else "it has no trials"
            hint = f"`escala logs {self.attempt.job_id}`; each trial's own log is in {self.home / 'trials'}"
            return Outcome("user_error", f"no trial gave a point: {reason}", hint)
        return Outcome("succeeded", f"{len(found.points)} points, {len(found.refused)} refused")


def train_trial(config: dict[str, Any], sweep: AttemptSpec, home: str, space: Space, data: Data) -> None:
    """The planned trials of these numbers one after another (the branches of a trunk, else one), or the one that an
    optimiser's values describe; in a process of Ray Tune's.
    """
    root = Path(home)
    if "numbers" not in config:
        workload = importlib.import_module(TRIAL_MODULE)
        trial = design.make_trial(space, from_optuna(space, config))
        key = data_key(space.workload, trial.config)
        prepared = data.get(key) or workload.prepare(_preparation(sweep, space.workload, trial.config))
        number = len(trials.read_planned(root, sweep.job_id)) + 1
        planned = identify(number, trial, prepared.fingerprints)
        trials.append_planned(root, sweep.job_id, planned)
        _train_one(planned, sweep, root, space, prepared)
        return
    chosen = [p for p in trials.read_planned(root, sweep.job_id) if p.number in config["numbers"]]
    with trials.held_trunk(root, chosen[0].trunk):
        for planned in chosen:
            _train_one(planned, sweep, root, space, data[data_key(space.workload, planned.trial.config)])
        trials.end_trunk(root, sweep.job_id, chosen[0].trunk)


def _train_one(planned: PlannedTrial, sweep: AttemptSpec, root: Path, space: Space, prepared: Any) -> None:
    """Train it, unless it is finished, and report how it ended."""
    from ray import tune

    workload = importlib.import_module(TRIAL_MODULE)
    files = TrialFiles(root, planned.fingerprint)
    report = partial(_report, tune) if space.aim == "search" else None
    with trials.held(files):
        outcome = trials.finished(files)  # by another sweep, while this one waited
        if outcome is None:
            if AttemptFiles(sweep.directory).control.exists():
                return  # the sweep is ending
            outcome = workload.run(
                trials.new_attempt(files, space.workload, space.aim, sweep, planned), prepared, report
            )
    record = outcome.record or {}
    loss = objective_of(record).minimised(record) if outcome.kind == "succeeded" else None
    tune.report({OBJECTIVE: float("inf") if loss is None else loss, "kind": outcome.kind})


def _report(tune: Any, step: int, loss_nats: float) -> None:
    if step:  # not the evaluation before the first step
        tune.report({OBJECTIVE: loss_nats, "step": step})


def identify(number: int, trial: design.Trial, data: Mapping[str, str]) -> PlannedTrial:
    """The trial with its fingerprint, and its trunk's."""
    trunk = trials.trunk_fingerprint(trial.config, data) if trial.branched else None
    return PlannedTrial(number, trials.trial_fingerprint(trial.config, data), trial, trunk)


def data_key(workload: str, config: Mapping[str, Any]) -> str:
    """The same for all configurations of a workload that read the same prepared data."""
    return fingerprint([config.get(section) for section in get_workload(workload).prepared_from])


def resources_of(workload: str, examples: list[design.Trial]) -> dict[str, float]:
    """What Tune reserves for a trial: its worker's resources; of a multi-worker trial, its waiting process alone."""
    if any(t.workers > 1 for t in examples):
        if any(t.workers == 1 for t in examples):
            raise SpecError(
                "a sweep's trials have one worker each, or several each, not both",
                "sweep resources.workers from 2 on, or make two sweeps",
            )
        return {"CPU": plan.TUNE_CPUS}
    needs = [get_workload(workload).worker_needs(t.config) for t in examples]
    return {kind: max(each[kind] for each in needs) for kind in ("CPU", "GPU")}


def _preparation(sweep: AttemptSpec, workload: str, config: Mapping[str, Any]) -> AttemptSpec:
    entry_point = get_workload(workload).entry_point
    return replace(sweep, workload=workload, entry_point=entry_point, config=dict(config))


def _prepare_on_cluster(attempt: AttemptSpec) -> Any:
    """Tokenise once, before many trials would at the same time. Raises DataError."""
    import ray
    import ray.exceptions

    def prepare() -> Any:
        return importlib.import_module(TRIAL_MODULE).prepare(attempt)

    try:
        prepared = ray.remote(num_cpus=1)(prepare).remote()
        importlib.import_module("ray.tune")  # the next thing that is needed takes a second, too
        return ray.get(prepared)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EscalaError):
            raise error.cause from None
        raise


def from_optuna(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's suggestion, from the unit cube to the space's values."""
    return {key: design.at(axis, float(config[key])) for key, axis in space.vary.items()}


def _optuna(space: Space) -> Any:
    """Optuna on the unit cube; a list is an axis of categories."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def distribution(axis: list[Any] | Range) -> Any:
        if isinstance(axis, Range):
            return optuna.distributions.FloatDistribution(0.0, 1.0 - 1e-9)
        return optuna.distributions.CategoricalDistribution([(i + 0.5) / len(axis) for i in range(len(axis))])

    cube = {key: distribution(axis) for key, axis in space.vary.items()}
    return OptunaSearch(space=cube, metric=OBJECTIVE, mode="min", seed=space.design_seed)


def _scheduler(space: Space) -> Any:
    if space.early_stopping is None:
        return None
    from ray.tune.schedulers import ASHAScheduler

    rule = space.early_stopping
    return ASHAScheduler(
        time_attr="training_iteration", grace_period=rule.grace, reduction_factor=rule.reduction
    )


if __name__ == "__main__":
    from escala.sweeps.tuner import main as run  # by its name, so that Ray's workers import it from there

    sys.exit(run(sys.argv[1:]))
