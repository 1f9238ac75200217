"""What a sweep will cost, before it starts: trials, tokens, FLOPs, time, and how many trials fit at once."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from escala.contract.errors import SpecError
from escala.contract.records import Outcome, read_record
from escala.laws.sample import FEWEST_UNITS
from escala.schema.workloads import get_workload
from escala.settings import Settings
from escala.sweeps import design
from escala.sweeps.design import Trial
from escala.sweeps.space import Space

ASSUMED_UTILIZATION = 0.3  # of this machine's matmul speed, where no trial has been measured yet
MATMUL_SIZE = 512
TUNE_CPUS = 0.1  # of a multi-worker trial's own process, which only waits


@dataclass(frozen=True)
class SweepPlan:
    """A sweep before it starts. Sums are of what is spent, over all `trials`: which of them are finished already shows
    once the data are read.
    """

    name: str
    trials: Sequence[Trial]
    train_tokens: int
    compute_flops: float
    alone_flops: float  # of the same points, were each trained alone; more where trials branch
    trunks: int | None  # of the branches; None: nothing branches
    fewest_trunks: int  # that a law's intervals need: its points are resampled by trunk
    concurrency: int | None  # None: the cluster's size is not known here
    wall_seconds: float | None  # None: that is not known either
    speed_source: str  # of wall_seconds, in words
    optimised: bool  # an optimiser chooses the trials: these are its space's middle, so many times
    chosen: Mapping[str, str] = field(default_factory=dict)  # what the space left open: key -> choice, reason


def make_plan(
    name: str, space: Space, settings: Settings, chosen: Mapping[str, str] | None = None
) -> SweepPlan:
    """The plan of a space on this home's cluster. Raises SpecError where a trial fits no configuration or machine.

    An optimiser's trials are not known; each is counted as the one in the middle of its space.
    """
    optimised = space.design == "optuna"
    found = [design.middle(space)] * (space.points or 1) if optimised else design.plan(space)
    at_once = None
    if settings.ray_address is None:
        at_once = fitting(
            space.workload, found, {"CPU": float(settings.num_cpus)}, space.concurrency, os.cpu_count()
        )
    speed, source = flops_per_second(settings.home, median(t.own_flops for t in found))
    return SweepPlan(
        name=name,
        trials=found,
        train_tokens=sum(t.own_tokens for t in found),
        compute_flops=sum(t.own_flops for t in found),
        alone_flops=sum(t.compute_flops for t in found),
        trunks=sum(t.shared_tokens == 0 for t in found) if space.branch else None,
        fewest_trunks=FEWEST_UNITS,
        concurrency=at_once,
        wall_seconds=None if at_once is None else seconds(found, speed, at_once),
        speed_source=source,
        optimised=optimised,
        chosen=dict(chosen or {}),
    )


def fitting(
    workload: str,
    trials: Sequence[Trial],
    have: Mapping[str, float],
    asked: int | None,
    cores: int | None = None,
) -> int:
    """How many trials may run at once, such that each has all its workers: else they wait for each other forever.

    Args:
        have: what the cluster has; its CPUs may be logical ones.
        asked: no more than so many.
        cores: of the machine behind logical CPUs: no more computing workers than cores, where that is not one trial.

    Raises SpecError, with the numbers, where one trial alone does not fit.
    """
    known = get_workload(workload)
    needs = [(known.worker_needs(t.config), known.sidecar_needs(t.config)) for t in trials]
    most = {kind: max(workers[kind] + sidecar[kind] for workers, sidecar in needs) for kind in ("CPU", "GPU")}
    waiting = TUNE_CPUS if any(t.workers > 1 for t in trials) else 0.0
    most["CPU"] += waiting
    short = [f"{most[k]:g} {k}s, and there are {have.get(k, 0):g}" for k in most if most[k] > have.get(k, 0)]
    if short:
        raise SpecError(
            f"the largest trial needs {'; '.join(short)}",
            "lower base.resources.workers or cpus_per_worker, or give the cluster more",
        )
    fit = min(int(have.get(kind, 0) / amount) for kind, amount in most.items() if amount)
    if cores is not None:
        fit = min(fit, int(cores / (most["CPU"] - waiting)))
    return max(1, min(fit, asked or fit))


def flops_per_second(home: Path, like: float) -> tuple[float, str]:
    """The speed of one worker, and where it is from: this home's trials nearest to `like` FLOPs, or an assumption."""
    measured = []
    for path in (home / "trials").glob("*/attempt-*/outcome.json"):
        outcome = read_record(Outcome, path)
        record = (outcome.record if outcome else None) or {}
        flops, seconds = record.get("attempt_flops"), record.get("wall_seconds")
        if flops and seconds:
            measured.append((flops, flops / seconds / (record.get("workers") or 1)))
    if measured:
        measured.sort(key=lambda pair: max(pair[0] / like, like / pair[0]))
        speed = median(rate for _, rate in measured[:8])
        return speed, f"{speed / 1e9:.0f} GFLOP/s a worker, as {len(measured[:8])} trials of this home had"
    speed = ASSUMED_UTILIZATION * _matmul_flops_per_second()
    return (
        speed,
        f"assumed: {speed / 1e9:.0f} GFLOP/s a worker, {ASSUMED_UTILIZATION:.0%} of one core's matmul here",
    )


def seconds(trials: Sequence[Trial], speed: float, concurrency: int) -> float:
    """Wall seconds of all trials at `speed` FLOP/s a worker."""
    alone: dict[
        int, float
    ] = {}  # by the number of the trial that begins them: branches run one after another
    for number, t in enumerate(trials):
        first = number if not t.shared_tokens else max(alone)
        alone[first] = alone.get(first, 0.0) + t.own_flops / t.workers
    return max(max(alone.values()), sum(alone.values()) / concurrency) / speed


def _matmul_flops_per_second() -> float:
    import numpy as np

    a = np.ones((MATMUL_SIZE, MATMUL_SIZE), dtype=np.float32)
    best = float("inf")
    for _ in range(5):
        cpu = time.process_time()  # of all threads together: the speed of one core
        a @ a
        best = min(best, time.process_time() - cpu)
    return 2.0 * MATMUL_SIZE**3 / max(best, 1e-6)
