"""Units that contradict one another: N in billions, tokens in millions, perplexity for a loss, FLOPs in petaFLOP days.

Inside a fit nothing depends on units (powers.py), so a law of such a table looks as good as any; every prediction and
plan that is asked in parameters, tokens and FLOPs would be far off.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from escala.laws.forms import known_inputs
from escala.laws.powers import Floats
from escala.laws.table import floats

COMPUTE_FACTOR = (
    30.0  # of compute_flops over 6 N D, either way, in the median row: attention and experts explain less
)
TOKENS_PER_PARAMETER = (
    1e-4,
    1e6,
)  # in the median row: from a short fine-tuning to 20 times what anybody has trained
LARGEST_LOSS = 9.0  # nats, in the median row; a uniform guess among 8,000 tokens has as much
ORDER = (("n_total", "n_active"), ("n_total", "n_non_embedding"))  # the first is at least the second


def contradictions(points: pd.DataFrame) -> list[str]:
    """What contradicts itself, in plain words; empty where nothing does."""
    known = {  # NaN where a number is missing or not positive
        name: np.where(values_N > 0, values_N, np.nan)
        for name in (*known_inputs(), "loss_nats")
        if name in points and ((values_N := floats(points[name])) > 0).any()
    }
    return [*_too_small(known), *_out_of_order(known), *_compute(known), *_ratio(known), *_loss(known)]


def _too_small(known: dict[str, Floats]) -> list[str]:
    return [
        f"units: {name} is below {least:,.0f} in {int((known[name] < least).sum())} of {len(known[name])} rows "
        f"(the smallest is {np.nanmin(known[name]):.4g}): give plain counts, not thousands, millions or billions"
        for name, each in known_inputs().items()
        if (least := each.smallest) is not None and name in known and (known[name] < least).any()
    ]


def _out_of_order(known: dict[str, Floats]) -> list[str]:
    return [
        f"units: {large} is less than {small} in {int((known[large] < known[small] * (1 - 1e-9)).sum())} of "
        f"{len(known[large])} rows: exchanged columns, or different units"
        for large, small in ORDER
        if large in known and small in known and (known[large] < known[small] * (1 - 1e-9)).any()
    ]


def _compute(known: dict[str, Floats]) -> list[str]:
    """Not for n_non_embedding: of small models the embeddings may be nearly all."""
    size = next((name for name in ("n_active", "n_total") if name in known), None)
    if size is None or not {"compute_flops", "tokens"} <= set(known):
        return []
    factor = _middle(known["compute_flops"] / (6 * known[size] * known["tokens"]))
    if factor is None or 1 / COMPUTE_FACTOR <= factor <= COMPUTE_FACTOR:
        return []
    return [
        f"units: compute_flops is {factor:.3g} times 6 {size} tokens in the median row: one of the three is in "
        "another unit, or compute_flops is in FLOP/s, petaFLOP-days or seconds"
    ]


def _ratio(known: dict[str, Floats]) -> list[str]:
    size = next((name for name in ("n_active", "n_total") if name in known), None)
    if size is None or "tokens" not in known:
        return []
    ratio, (low, high) = _middle(known["tokens"] / known[size]), TOKENS_PER_PARAMETER
    if ratio is None or low <= ratio <= high:
        return []
    return [f"units: {ratio:.3g} tokens per parameter in the median row: {size} or tokens is in another unit"]


def _loss(known: dict[str, Floats]) -> list[str]:
    middle = _middle(known["loss_nats"]) if "loss_nats" in known else None
    if middle is None or middle <= LARGEST_LOSS:
        return []
    return [
        f"units: loss_nats is {middle:.4g} in the median row, as much as a guess among thousands of tokens: "
        "a perplexity (take its logarithm), or a sum over tokens?"
    ]


def _middle(values_N: Floats) -> float | None:
    """The median of what is known; None where nothing is."""
    known_N = values_N[np.isfinite(values_N)]
    return float(np.median(known_N)) if len(known_N) else None
