"""How fast each kind of attention is on a device, and from which context on it overtakes exact: a part of a cluster's
file, written by `escala bench attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from pydantic import Field

from escala.schema.attention.kind import KINDS
from escala.schema.base import Strict

Seconds = dict[int, float]


class KindSpeed(Strict):
    """Seconds of one layer by context T, one sequence; of one token in `decode`, with the work that all layers share
    left out.
    """

    forward: Seconds = Field(default_factory=dict, description="by T: forward alone")
    train: Seconds = Field(default_factory=dict, description="by T: forward and backward")
    decode: Seconds = Field(default_factory=dict, description="by T: one more token after T tokens")
    train_overtakes: int | None = Field(
        None,
        gt=0,
        description="T from which on train is faster than exact's; None: at no T that was measured",
    )
    decode_overtakes: int | None = Field(None, gt=0, description="the same of decode")
    left_out: list[str] = Field(default_factory=list, description="what was not measured, and why")


class AttentionSpeed(Strict):
    """Speeds of all kinds in one precision, and the layer that was measured."""

    heads: int = Field(gt=0, description="query and key/value heads")
    head_size: int = Field(gt=0, description="width of a head")
    window_tokens: int = Field(gt=0, description="of the kinds that have a window")
    features: int = Field(gt=0, description="width of phi, of the kinds that have features")
    kinds: dict[str, KindSpeed] = Field(min_length=1, description="by the kind's name")
    source: str = Field(min_length=1, description="the run that measured it")


def with_overtaking(kinds: Mapping[str, KindSpeed]) -> dict[str, KindSpeed]:
    """The same, each kind but exact with the contexts at which it overtakes exact."""
    exact = kinds.get(str(KINDS.default))
    if exact is None:
        return dict(kinds)
    return {
        name: speed
        if speed is exact
        else speed.model_copy(
            update={
                "train_overtakes": overtakes(speed.train, exact.train),
                "decode_overtakes": overtakes(speed.decode, exact.decode),
            }
        )
        for name, speed in kinds.items()
    }


def overtakes(seconds: Seconds, exact: Seconds) -> int | None:
    """The context from which on, at every larger one that was measured of both, `seconds` are fewer than `exact`'s:
    where the ratio crosses 1, linear between two contexts in the logarithms; None where the largest is not faster.
    """
    contexts = sorted(seconds.keys() & exact.keys())
    ratios: dict[int, float] = {t: math.log(seconds[t] / exact[t]) for t in contexts}
    if not contexts or ratios[contexts[-1]] >= 0:
        return None
    for low, high in reversed(list(pairwise(contexts))):
        if ratios[low] >= 0:
            share = ratios[low] / (ratios[low] - ratios[high])
            return math.ceil(low * math.pow(high / low, share))
    return contexts[0]
