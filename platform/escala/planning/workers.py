"""How many workers pay: a run's time, memory, energy and money by the number of its workers P, and the best P. Pure.

At a fixed batch another worker pays while cost times time, P T(P) * T(P), still falls: -dlnT/dlnP >= 1/2
(docs/theory D.7). P* is the P that minimises P T^2 among those that share the batch and fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from escala.contract.errors import SpecError
from escala.planning.cost import LINK_UNKNOWN, cost, has_link, memory_bytes
from escala.schema import TrainedConfig
from escala.schema.hardware import Cluster, Device, Precision


@dataclass(frozen=True)
class WorkersRow:
    """A run on `workers` devices, one each. None: the cluster's file does not say what it takes to know."""

    workers: int  # P
    micro_batch_sequences: int  # of one worker
    activation_checkpointing: bool
    step_seconds: float  # T, of one optimiser step
    compute_seconds: float  # of one step
    exposed_seconds: float  # of one step: communication that nothing hides
    wall_seconds: float  # of all steps
    memory_bytes: float  # of one device
    energy_joules: float | None  # of the run at the meter, an estimate
    usd: float | None  # of the run
    fits: bool  # in the device's memory
    speed_up: float | None = None  # over the fewest workers that fit; None where it does not
    gain: float | None = None  # -dlnT/dlnP, from the next fewer workers that fit; None where there are none

    @property
    def exposed_share(self) -> float:
        """Of the step's time."""
        return self.exposed_seconds / self.step_seconds


@dataclass(frozen=True)
class BestWorkers:
    """P* and how clear it is. Margins: by which share P T^2 is higher at the best of fewer, or of more, workers; None
    where there are none.
    """

    workers: int  # P*
    fastest: int  # P of the least T
    margin_fewer: float | None
    margin_more: float | None
    over_fastest: float  # T(P*) over the least T


@dataclass(frozen=True)
class WorkersCurve:
    """What a run takes by the number of its workers, and the number that pays. None: no number fits."""

    rows: tuple[WorkersRow, ...]  # P rising, all that share batch and experts, up to max_workers
    best: BestWorkers | None
    precision: Precision
    own_workers: int  # as configured
    max_workers: int  # as many were looked at
    next_workers: int | None  # the least P beyond that shares the batch; None: there is none
    ends: str  # why the rows end where they do, in words
    notes: tuple[str, ...]


def choose(step_seconds: Mapping[int, float]) -> BestWorkers:
    """P* of the seconds of a step by P, at least one; of equal ones the smallest."""
    worth = {p: p * step_seconds[p] ** 2 for p in sorted(step_seconds)}
    best = min(worth, key=worth.__getitem__)
    fastest = min(worth, key=step_seconds.__getitem__)

    def margin(others: list[float]) -> float | None:
        return min(others) / worth[best] - 1 if others else None

    return BestWorkers(
        workers=best,
        fastest=fastest,
        margin_fewer=margin([value for p, value in worth.items() if p < best]),
        margin_more=margin([value for p, value in worth.items() if p > best]),
        over_fastest=step_seconds[best] / step_seconds[fastest],
    )


def workers_curve(
    config: TrainedConfig, cluster: Cluster, max_workers: int | None = None, *, make_fit: bool = False
) -> WorkersCurve:
    """The run on every number of workers that its batch and experts can be shared by, the rest as in `config`: ZeRO
    stage, precision, micro-batch (where that follows from the batch, each P has its own).

    Args:
        max_workers: at most so many; None: the cluster's devices. Beyond these its device's link is extrapolated.
        make_fit: where it does not fit as configured, with activation checkpointing and the largest micro-batch that
            does.

    Raises SpecError for max_workers below 1.
    """
    most = cluster.devices if max_workers is None else max_workers
    if most < 1:
        raise SpecError(f"max_workers is {most}", "give 1 or more")
    ends = f"more than {most} were not looked at"
    if not has_link(cluster.device):
        most, ends = 1, LINK_UNKNOWN
    sharing = list(_sharing(config))
    asked = [each for each in sharing if each.resources.workers <= most]
    rows = [_row(_made_fit(each, cluster.device) if make_fit else each, cluster) for each in asked]
    fitting = {row.workers: row.step_seconds for row in rows if row.fits}
    beyond = [each.resources.workers for each in sharing if each.resources.workers > most]
    return WorkersCurve(
        rows=tuple(_compared(rows)),
        best=choose(fitting) if fitting else None,
        precision=config.training.precision,
        own_workers=config.resources.workers,
        max_workers=most,
        next_workers=min(beyond, default=None),
        ends=ends if beyond else "no more share the batch",
        notes=tuple(_notes(config, cluster, asked[-1].resources.workers)),
    )


def _sharing(config: TrainedConfig) -> Iterator[TrainedConfig]:
    """`config` on each number of workers that the schema admits, fewest first."""
    for workers in _divisors(config.training.batch_sequences):
        try:
            yield config.with_workers(workers)
        except ValueError:
            continue


def _made_fit(config: TrainedConfig, device: Device) -> TrainedConfig:
    """`config` where it fits, or nothing helps; else with checkpointing and the largest micro-batch that fits."""

    def fits(tried: TrainedConfig) -> bool:
        return memory_bytes(tried, device).total <= device.memory_bytes.value

    if fits(config):
        return config
    training, share = config.training, config.training.batch_sequences // config.resources.workers
    for micro in reversed(_divisors(share)):
        changed = {"activation_checkpointing": True, "micro_batch_sequences": micro}
        tried = config.model_copy(update={"training": training.model_copy(update=changed)})
        if fits(tried):
            return tried
    return config


def _divisors(n: int) -> list[int]:
    low = [p for p in range(1, math.isqrt(n) + 1) if n % p == 0]
    return sorted({*low, *(n // p for p in low)})


def _row(config: TrainedConfig, cluster: Cluster) -> WorkersRow:
    found = cost(config, cluster)
    return WorkersRow(
        workers=config.resources.workers,
        micro_batch_sequences=config.micro_batch_sequences,
        activation_checkpointing=config.training.activation_checkpointing,
        step_seconds=found.step_seconds,
        compute_seconds=found.compute_seconds,
        exposed_seconds=found.exposed_seconds,
        wall_seconds=found.wall_seconds,
        memory_bytes=found.memory.total,
        energy_joules=found.energy_joules,
        usd=found.usd,
        fits=found.fits,
    )


def _compared(rows: list[WorkersRow]) -> Iterator[WorkersRow]:
    """The rows; those that fit with what they gain over fewer workers."""
    first: WorkersRow | None = None
    last: WorkersRow | None = None
    for row in rows:
        if not row.fits:
            yield row
            continue
        first, gain = first or row, None
        if last is not None:
            gain = math.log(last.step_seconds / row.step_seconds) / math.log(row.workers / last.workers)
        yield replace(row, speed_up=first.step_seconds / row.step_seconds, gain=gain)
        last = row


def _notes(config: TrainedConfig, cluster: Cluster, most: int) -> Iterator[str]:
    """What the curve up to `most` workers rests on."""
    device, link = cluster.device, cluster.device.link_bytes_per_second
    if link is None or not has_link(device):
        yield f"one worker alone: {LINK_UNKNOWN}"
    elif most > cluster.devices:
        yield (
            f"beyond the cluster's {cluster.devices} devices its device's link is taken to join all of them at the "
            f"same latency: {link.source}; the device was {device.measured}"
        )
    if most > 1 and not config.resources.gpus_per_worker:
        yield "resources.gpus_per_worker is 0: nothing hides communication behind compute"
