"""What a spec comes to on a cluster."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from escala.schema.hardware import Cluster
from escala.views.base import View
from escala.views.workers import WorkersView

if TYPE_CHECKING:
    from escala.planning.cost import Cost
    from escala.planning.workers import WorkersCurve
    from escala.spec import Resolved


class MemoryView(View):
    """Bytes on one device at the step's fullest moment; `total` is less than the sum where the parts do not meet."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    activations: float
    runtime: float
    total: float


class CommunicationView(View):
    """What one device sends in an optimiser step."""

    sent_bytes: float
    messages: int


class ContextCostView(View):
    """What one sequence of `context_tokens` takes with the run's model, in bytes on one device beside the model's
    states.
    """

    context_tokens: int
    chi: float  # of a token's cost, relative to one without attention
    activations: float  # of all blocks in a training step, and what one works on in its backward pass
    checkpointed: float  # the same with activation checkpointing
    logits: float  # with their log-probabilities and gradient, in either case
    state: float  # in generation: keys and values, or what the kind keeps in their place


class CostView(View):
    """A run's cost on a cluster. Seconds are of optimiser steps alone. None: the cluster's file does not say what it
    takes to know.
    """

    n_total: int
    n_active: int
    train_tokens: int
    steps: int
    attention: str  # the kind
    chi: float  # attention's part: of a token's cost, relative to one without it
    compute_flops: float  # of the model; recomputation is not counted
    hardware_flops: float  # with it
    memory_bytes: MemoryView
    kv_cache_bytes_per_token: float  # by which generation's state of a long sequence grows; 0: it is constant
    contexts: tuple[ContextCostView, ...]  # the run's own, then longer ones
    communication: CommunicationView
    compute_seconds: float  # of one step
    exposed_seconds: float  # of one step: communication that nothing hides
    step_seconds: float
    wall_seconds: float  # of all steps
    model_flops_utilization: float
    energy_joules: float | None  # at the meter, an estimate
    cost_usd: float | None
    carbon_gco2e: float | None
    fits: bool  # in the device's memory
    notes: tuple[str, ...]
    cluster: Cluster
    workers: WorkersView  # the same run on other numbers of workers, and the number that pays

    @classmethod
    def of_cost(cls, found: Cost, cluster: Cluster, curve: WorkersCurve) -> CostView:
        """Of a cost, the cluster that it is for, and the curve over the number of workers."""
        renamed = {"memory": "memory_bytes", "usd": "cost_usd", "gco2e": "carbon_gco2e"}
        fields = {renamed.get(name, name): value for name, value in asdict(found).items()}
        workers = WorkersView.of_curve(curve)
        return cls(**fields, step_seconds=found.step_seconds, cluster=cluster, workers=workers)


class ResolvedSpecView(View):
    """A spec in full, what was derived (dotted key -> value), and what it costs."""

    spec: dict[str, Any]
    derived: dict[str, Any]
    cost: CostView

    @classmethod
    def of_resolved(cls, answer: Resolved, cost: CostView) -> ResolvedSpecView:
        """Of a resolved spec and its cost."""
        options = answer.spec.options.model_dump(mode="json")
        spec = {"workload": answer.spec.workload, "job": options, **answer.spec.plain()}
        return cls(spec=spec, derived=answer.derived, cost=cost)
