"""How many workers pay for the run that a law plans: the run's configuration, then `workers_curve`."""

from __future__ import annotations

from dataclasses import replace

from escala import spec
from escala.contract.errors import SpecError
from escala.hardware import load_cluster
from escala.laws import queries as laws
from escala.laws.reference import Stored
from escala.planning.law_runs import base_of
from escala.planning.plans import PlanOptions, config_for
from escala.planning.workers import WorkersCurve, workers_curve
from escala.schema import PretrainConfig
from escala.schema.hardware import Cluster
from escala.settings import Settings
from escala.sweeps.recipes import by_recipe

MADE_FIT = (
    "where it does not fit as configured: with activation checkpointing and the largest micro-batch that fits"
)
ONE_FIGURE = "joules_per_flop is one figure of the device: the same in every precision"


def plan_workers(
    settings: Settings,
    reference: str,
    n_active: float,
    n_total: float,
    tokens: float,
    context_tokens: float | None,
    options: PlanOptions,
    max_workers: int | None = None,
) -> list[WorkersCurve]:
    """The planned run on each number of workers: in the options' precision, then in the others of the device's figures.

    Hours, energy and money are the training's, of the run that is configured like the law's runs. They differ from
    those of the plan, which knows no configuration and has one speed (`plans.cluster_speed`), in this: FLOPs are those
    of the shape that was found and of whole steps, not kappa N D chi; blocks have the speed measured at their width,
    the logits their own; the optimiser's update and exposed communication take time, in which static power is drawn;
    and bytes moved in memory are counted (docs/theory E.1), not taken as half of the bandwidth.

    Where the run as configured does not fit in a device's memory, it has activation checkpointing and the largest
    micro-batch that fits: a third more FLOPs.

    Raises SpecError where the run cannot be configured.
    """
    stored, cluster = laws.law(settings, reference), load_cluster(options.cluster or settings.cluster)
    if options.max_memory_gb is not None:
        cluster = _with_memory(cluster, options.max_memory_gb * 1e9)
    config, how = _planned(stored, n_active, n_total, tokens, context_tokens)
    figures = sorted(cluster.device.peak_flops_per_second, key=lambda name: name != options.precision)
    notes = (how, *([ONE_FIGURE] if len(figures) > 1 else []))
    found = []
    for precision in figures:
        training = config.training.model_copy(update={"precision": precision})
        asked = config.model_copy(update={"training": training})
        curve = workers_curve(asked, cluster, max_workers, make_fit=True)
        changed = any(row.activation_checkpointing != training.activation_checkpointing for row in curve.rows)
        found.append(replace(curve, notes=(*notes, *([MADE_FIT] if changed else []), *curve.notes)))
    return found


def _with_memory(cluster: Cluster, limit_bytes: float) -> Cluster:
    memory = cluster.device.memory_bytes.model_copy(update={"value": limit_bytes})
    return cluster.model_copy(update={"device": cluster.device.model_copy(update={"memory_bytes": memory})})


def _planned(
    stored: Stored, n_active: float, n_total: float, tokens: float, context_tokens: float | None
) -> tuple[PretrainConfig, str]:
    """The run's configuration, and in words where it is from. Raises SpecError."""
    if base_of(stored):
        written = config_for(stored, n_active, n_total, tokens, context_tokens=context_tokens)
        how = "the run is configured like the law's runs"
    elif n_total > n_active * 1.01:
        raise SpecError(
            f"{stored.reference} has no configuration, and a mixture's experts do not follow from its sizes",
            "escala cost SPEC.yaml, with the mixture's model.moe",
        )
    else:
        axes = {"n_total": n_total, "tokens": tokens}
        if context_tokens is not None:
            axes["context_tokens"] = float(round(context_tokens))
        written = by_recipe({}, axes)
        how = (
            "the law has no configuration: the run is the recipe's, with sequences of "
            f"{written['training']['context_tokens']:,} tokens, else by default"
        )
    config: PretrainConfig = spec.validate(PretrainConfig, written, "the planned run")
    return config, how
