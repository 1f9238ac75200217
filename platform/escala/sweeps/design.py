"""From a space to trials: which points, and the whole configuration of each. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from escala import spec
from escala.contract.attempt import flatten
from escala.contract.errors import SpecError
from escala.laws.audit import FACTORS
from escala.sweeps.recipes import AXES, by_recipe
from escala.sweeps.space import Range, Space, Value

SEED = "training.seed"
TRIAL_DEFAULTS = {"training": {"checkpoint_every_steps": 0}}  # a trial that is lost starts again: it is short
ONE_WORKER_DEFAULTS = {"training": {"zero_stage": 0}}  # nothing to share


@dataclass(frozen=True)
class Trial:
    """One run to be made: what was varied, and everything that follows."""

    values: dict[str, Value]  # of the space's axes, and the seed
    config: dict[str, Any]  # the workload's, resolved
    n_total: int
    n_active: int
    train_tokens: int
    context_tokens: int
    compute_flops: float
    audits: float | None = None  # the factor of the recipe's learning rate; None: a point of the sweep

    @property
    def label(self) -> str:
        """The values in a line, for people."""
        return " ".join(f"{key.rpartition('.')[2]}={_short(v)}" for key, v in self.values.items())

    @property
    def workers(self) -> int:
        """Ray Train workers that it needs."""
        return int(self.config["resources"]["workers"])

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def plan(space: Space) -> list[Trial]:
    """All trials of a design, the costliest first (so that none is left to run alone at the end), none twice.

    Raises SpecError for a point that no configuration fits, and where no point is left.
    """
    whole = [make_trial(space, values) for values in points(space)]
    kept = sorted((t for t in whole if _within(space, t)), key=lambda t: t.compute_flops)
    if not kept:
        raise SpecError(
            f"none of the {len(whole)} points lies within the bounds", "widen `within`, or the axes"
        )
    trials = [with_seed(t, seed) for t in kept for seed in space.seeds]
    if space.repeats:
        cheapest = kept[: space.repeats.points]
        trials += [with_seed(t, seed) for t in cheapest for seed in space.repeats.seeds]
    if space.audit:
        trials += audit_trials(space, kept[-1], space.seeds[0])
    unique = {repr(sorted(flatten(t.config).items())): t for t in reversed(trials)}
    return sorted(unique.values(), key=lambda t: -t.compute_flops)


def audit_trials(space: Space, largest: Trial, seed: int) -> list[Trial]:
    """The largest point at the audit's other learning rates; and, with a horizon, at so many times its tokens at all of
    them (laws.audit). Raises SpecError for a longer run that no configuration fits.
    """
    found = [_at_rate(with_seed(largest, seed), factor) for factor in FACTORS if factor != 1.0]
    horizon = None if space.audit is None else space.audit.horizon
    if horizon is not None:
        size = "n_active" if largest.config["model"].get("moe") else "n_total"
        kept = {
            key: value for key, value in largest.values.items() if key not in AXES or key == "context_tokens"
        }
        values = {**kept, size: getattr(largest, size), "tokens": horizon * largest.train_tokens}
        longer = with_seed(make_trial(space, values), seed)
        found += [_at_rate(longer, factor) for factor in FACTORS]
    return found


def _at_rate(trial: Trial, factor: float) -> Trial:
    config = deepcopy(trial.config)
    optimizer = config["training"]["optimizer"]
    optimizer["learning_rate"] = float(f"{optimizer['learning_rate'] * factor:.4g}")
    return replace(trial, values={**trial.values, "audit": factor}, config=config, audits=factor)


def points(space: Space) -> Iterator[dict[str, Value]]:
    """The design's points, without seeds. Raises SpecError for design optuna, which chooses as it goes."""
    if space.design == "optuna":
        raise SpecError("an optuna space has no points beforehand", "start the sweep")
    drawn = _drawn(space) if space.design in ("sobol", "random") else _grid(space)
    for cell, point in product(space.cells, list(drawn)):
        yield {**cell, **point}


def _grid(space: Space) -> Iterator[dict[str, Value]]:
    levels = [axis if isinstance(axis, list) else _levels(axis) for axis in space.vary.values()]
    for values in product(*levels):
        yield dict(zip(space.vary, values, strict=True))


def _levels(axis: Range) -> list[Value]:
    count = axis.count or 2
    space = np.geomspace if axis.scale == "log" else np.linspace
    return [_tidy(float(v)) for v in space(axis.low, axis.high, count)]


def _drawn(space: Space) -> Iterator[dict[str, Value]]:
    from scipy.stats import qmc

    axes, count = list(space.vary.items()), space.points or 1
    if space.design == "sobol":
        unit = qmc.Sobol(len(axes), rng=space.design_seed).random_base2(math.ceil(math.log2(count)))[:count]
    else:
        unit = np.random.default_rng(space.design_seed).random((count, len(axes)))
    for row in unit:
        yield {key: at(axis, float(u)) for (key, axis), u in zip(axes, row, strict=True)}


def at(axis: list[Value] | Range, unit: float) -> Value:
    """The value at `unit` in [0, 1) of an axis: of a list, each item has an equal share."""
    if isinstance(axis, list):
        return axis[min(int(unit * len(axis)), len(axis) - 1)]
    if axis.scale == "log":
        return _tidy(axis.low * (axis.high / axis.low) ** unit)
    return _tidy(axis.low + (axis.high - axis.low) * unit)


def _tidy(value: float) -> float:
    """Four significant digits: a learning rate of 0.003, not 0.0030000000000000005."""
    return float(f"{value:.4g}")


def make_trial(space: Space, values: Mapping[str, Value]) -> Trial:
    """The trial at `values`: recipe, then the space's base, then the configuration keys that vary.

    Raises SpecError, naming the point, where no configuration fits it.
    """
    axes = {key: value for key, value in values.items() if key in AXES}
    base: dict[str, Any] = deepcopy(space.base)
    for key, value in values.items():
        if key not in AXES:
            set_key(base, key, value)
    try:
        base = spec.merge(by_recipe(base, axes), base)
        job = spec.load_job(space.workload, base=_with_defaults(base))
    except SpecError as error:
        raise SpecError(f"at {_point(values)}: {error.message}", error.hint) from error
    answer = spec.resolve(job)
    return Trial(
        values=dict(values),
        config=job.plain(),
        n_total=answer.n_total,
        n_active=answer.n_active,
        train_tokens=answer.train_tokens,
        context_tokens=job.trained.context_tokens,
        compute_flops=answer.compute_flops,
    )


def middle(space: Space) -> Trial:
    """The trial in the middle of every axis."""
    return make_trial(space, {key: at(axis, 0.5) for key, axis in space.vary.items()})


def with_seed(trial: Trial, seed: int) -> Trial:
    """The same trial from another seed: of the weights and of the data's order."""
    config = deepcopy(trial.config)
    config["training"]["seed"] = seed
    counts = {k: v for k, v in trial.plain().items() if k not in ("values", "config")}
    return Trial(values={**trial.values, SEED: seed}, config=config, **counts)


def _with_defaults(base: dict[str, Any]) -> dict[str, Any]:
    base = spec.merge(TRIAL_DEFAULTS, base)
    workers = base.get("resources", {}).get("workers", 1)
    return spec.merge(ONE_WORKER_DEFAULTS, base) if workers == 1 else base


def set_key(config: dict[str, Any], key: str, value: Value) -> None:
    """Set the dotted `key` in place."""
    *sections, last = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[last] = value


def _within(space: Space, trial: Trial) -> bool:
    found = {
        "compute_flops": trial.compute_flops,
        "n_total": trial.n_total,
        "n_active": trial.n_active,
        "tokens": trial.train_tokens,
        "tokens_per_parameter": trial.train_tokens / trial.n_active,
    }
    return all(bounds.hold(found[name]) for name, bounds in space.within.items())


def _point(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in values.items())


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
