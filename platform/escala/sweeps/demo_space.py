"""The sizes of the demo's runs, from what this machine does in a second and how long the demo may take. Pure.

The sweep is a ladder: four sizes N, a factor 1.6 apart, each with lengths D up to about the same compute. So the points
spread over N and over D. Batch and learning rate are the recipe's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from escala.laws.priors import LITERATURE
from escala.schema import ModelConfig
from escala.schema.flops import flops_per_token, parameter_counts
from escala.sweeps.recipes import shape

NAME = "demo"  # of the space in tune_spaces/
PLANNED = 4.1  # the planned run's compute, in that of the sweep's largest trial
SIZES = (13_392, 21_624, 37_024, 56_520)
LENGTHS: tuple[tuple[float, ...], ...] = (  # of each size, in the shortest's
    (1, 1.5, 2, 3, 4),
    (1, 1.5, 2, 3),
    (1, 1.5, 2),
    (1, 1.25),
)
LEAST_TOKENS = 8e5  # below, such models learn in a jump that the law's form does not have
MOST_TOKENS = 1.6e6  # of the shortest run: more would make the demo no better
FORM = "interaction"  # form nd was 3 to 5 % above the losses of runs five times as large
# Fourteen small runs do not determine six parameters, so priors are stated, and the law says how far they moved it.
# L_inf: 1.69 nats a token of some 4.5 bytes (Hoffmann et al. 2022: 10.5 TB are 2.34e12 tokens) are 0.38 nats a byte;
# a token is 1.6 bytes here. Its standard deviation, of the logarithm, is wide: that was another text.
PRIORS = {**LITERATURE, "L_inf": (-0.5, 0.5)}
BATCH_SEQUENCES = 10  # with which the speed is measured: about what the recipe chooses
FIXED_CPU_SECONDS = 195.0  # of two cores: cluster, data, the start and the evaluation of every run, the fit
ALONE = 1.2  # the planned run's speed in that of the largest size, which was measured with both cores at work


@dataclass(frozen=True)
class MachineSpeed:
    """FLOP/s of one process while both train: of the smallest and of the largest size. `share`: of a core that each
    has, for what is no training.
    """

    small: float
    large: float
    share: float


@dataclass(frozen=True)
class DemoSpace:
    """The sweep's overrides of the space `demo`, and what it will take."""

    overrides: tuple[str, ...]
    trials: int
    compute_flops: float  # of the whole sweep
    largest_flops: float
    seconds: float  # of the whole demo, estimated
    fits: bool  # into the minutes that were asked for


def demo_space(speed: MachineSpeed, minutes: float, seed: int, base: Mapping[str, Any]) -> DemoSpace:
    """The demo's sweep on a machine of that speed.

    Args:
        base: the space's configuration, whose vocabulary and context the counts depend on.
    """
    fixed = FIXED_CPU_SECONDS / 2 / max(speed.share, 0.05)
    per_token = _seconds(speed, base)  # of the shortest D, in tokens
    tokens = min(max((60 * minutes - fixed) / per_token, LEAST_TOKENS), MOST_TOKENS)
    seconds = fixed + per_token * tokens
    model = base["model"]
    costs = [
        (_flops(n, model) * k * tokens, _cell(n, k * tokens))
        for n, lengths in zip(SIZES, LENGTHS, strict=True)
        for k in lengths
    ]
    return DemoSpace(
        overrides=(
            f"cells={json.dumps([cell for _, cell in costs])}",
            f"seeds=[{seed}]",
            f"base.training.seed={seed}",  # of the planned run, which is no trial
        ),
        trials=len(costs),
        compute_flops=sum(flops for flops, _ in costs),
        largest_flops=max(flops for flops, _ in costs),
        seconds=seconds,
        fits=seconds <= 60 * minutes + 1,
    )


def shapes(base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `model` sections of the smallest and of the largest size, whose speed is to be measured."""
    return [{**base["model"], **shape(n, base["model"], "n_total")} for n in (SIZES[0], SIZES[-1])]


def _cell(n: int, tokens: float) -> dict[str, float]:
    return {"n_total": n, "tokens": float(f"{tokens:.4g}")}


def _flops(n: int, model: Mapping[str, Any]) -> float:
    """Of a token of training."""
    config = ModelConfig(**{**model, **shape(n, model, "n_total")})
    return flops_per_token(config, config.max_context_tokens).total


def _seconds(speed: MachineSpeed, base: Mapping[str, Any]) -> float:
    """Of the sweep on two processes and of the planned run on one, per token of the shortest run."""
    sizes: Sequence[int] = [parameter_counts(ModelConfig(**model)).n_total for model in shapes(base)]
    costs = [
        (_flops(n, base["model"]) * k, n) for n, lengths in zip(SIZES, LENGTHS, strict=True) for k in lengths
    ]
    sweep = sum(flops / _between(speed, n, sizes) for flops, n in costs) / 2
    run = PLANNED * max(flops for flops, _ in costs) / (ALONE * speed.large)
    return sweep + run


def _between(speed: MachineSpeed, n: float, sizes: Sequence[int]) -> float:
    """The speed at a size between the two measured ones: linear in N."""
    part = (n - sizes[0]) / (sizes[1] - sizes[0])
    return speed.small + min(max(part, 0.0), 1.0) * (speed.large - speed.small)
