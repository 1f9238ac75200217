"""From (C, N, D, T) to a model, a batch and a learning rate: what a point of a sweep leaves open.

The schedule stays the configuration's own, and ends with its decay at each run's own D: a run cut from a longer
schedule has not decayed, and would bias a law (Hoffmann et al. 2022, section 3.1).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from escala.contract.errors import SpecError
from escala.schema import ModelConfig
from escala.schema.flops import flops_per_token, parameter_counts

AXES = ("compute_flops", "n_total", "n_active", "tokens", "tokens_per_parameter", "context_tokens")
CHINCHILLA_RATIO = 20.0  # tokens per parameter (Hoffmann et al. 2022, table 3)
MISS = 0.15  # |log(n/N)| of the nearest shape, at most
MIN_LAYERS = 2
MIN_STEPS = 100  # below that, a batch is too large for its tokens, whatever the rule says
MOST = {"compute_flops": 1e32, "n_total": 1e14, "n_active": 1e14, "tokens": 1e16, "tokens_per_parameter": 1e9}
TABLE = Path(__file__).with_name("learning_rate.csv")
STEADY = ("wsd", "constant")  # schedules that stay at the peak rate; the rule's table was made under cosine
STEADY_RATE = 0.71  # of cosine's best rate: the geometric mean over learning_rate_wide.csv


def sections(
    base: Mapping[str, Any],
    *,
    compute_flops: float | None = None,
    n_total: float | None = None,
    n_active: float | None = None,
    tokens: float | None = None,
    tokens_per_parameter: float | None = None,
    context_tokens: float | None = None,
) -> dict[str, Any]:
    """The `model` and `training` sections at a point, to go below what the user wrote himself.

    Any two of all but the context say N and D; compute_flops alone means 20 tokens per parameter; n_total or n_active
    alone fixes the model, tokens alone the length. C is exact: FLOPs per token of the shape that was found, at its
    context, times D. Of a mixture of experts the parameters that tokens, learning rate and FLOPs are counted by are the
    active ones; its experts are the base's.

    Args:
        base: what the user wrote (partial): vocabulary, head size, workers, ... shape and FLOPs depend on it.

    Raises SpecError for axes that contradict each other or `base`, and for an N that no shape has.
    """
    sizes = {"compute_flops": compute_flops, "n_total": n_total, "n_active": n_active, "tokens": tokens}
    sizes["tokens_per_parameter"] = tokens_per_parameter
    given = {name: value for name, value in sizes.items() if value is not None}
    _check(given, base)
    model, training = dict(base.get("model", {})), dict(base.get("training", {}))
    context = int(context_tokens or training.get("context_tokens") or ModelConfig(**model).max_context_tokens)
    made: dict[str, Any] = {"model": {}, "training": {"context_tokens": context}}
    if context > model.get("max_context_tokens", 0):
        made["model"]["max_context_tokens"] = context
    model |= made["model"]
    if set(given) - {"tokens"}:
        made["model"] |= _shape_for(given, model, context)
    if set(given) - {"n_total", "n_active"}:
        config = ModelConfig(**{**model, **made["model"]})
        n = parameter_counts(config).n_active
        length = _length(given, n, flops_per_token(config, context).total)
        made["training"] |= {"train_tokens": round(length), **_tuning(base, n, length, context)}
    return made


def _check(given: Mapping[str, float], base: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise SpecError(f"{name} is {value:g}", "give a positive number")
        if value > MOST[name]:
            raise SpecError(f"{name} is {value:g}, and no machine has more than {MOST[name]:g}", "give less")
    if len(given) > 2 or {"n_total", "n_active"} <= set(given):
        raise SpecError(f"{', '.join(given)} together say N and D more than once", "give two of them")
    if set(given) == {"tokens_per_parameter"}:
        raise SpecError(
            "tokens_per_parameter alone says neither N nor D", "add compute_flops, n_total or tokens"
        )
    fixed = [key for key in ("d_model", "n_layers") if key in base.get("model", {})]
    if set(given) - {"tokens"} and fixed:
        raise SpecError(
            f"{', '.join(given)} decide the model's shape, and so does model.{fixed[0]}", "drop one"
        )


def _shape_for(given: Mapping[str, float], model: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The shape whose N the axes say, or the one whose FLOPs meet the budget."""
    for count in ("n_total", "n_active"):
        if count in given:
            return shape(given[count], model, count)
    if "compute_flops" not in given:  # tokens and their ratio
        return shape(given["tokens"] / given["tokens_per_parameter"], model)
    budget = given["compute_flops"]
    ratio = given.get("tokens_per_parameter", CHINCHILLA_RATIO)
    n = math.sqrt(budget / 6 / ratio) if "tokens" not in given else budget / 6 / given["tokens"]
    for _ in range(
        4
    ):  # FLOPs per token are 6 N only nearly: attention counts, a looked-up embedding does not
        found = shape(n, model)
        config = ModelConfig(**{**model, **found})
        per_token, size = flops_per_token(config, context).total, parameter_counts(config).n_active
        length = given.get("tokens") or ratio * size
        n *= (budget / (per_token * length)) ** (1.0 if "tokens" in given else 0.5)
    return found


def _length(given: Mapping[str, float], n: int, flops: float) -> float:
    """D. With compute_flops it is what the budget buys, so that C is exact where N could only be near."""
    if "compute_flops" in given:
        return given["compute_flops"] / flops
    return given["tokens"] if "tokens" in given else given["tokens_per_parameter"] * n


def shape(n: float, model: Mapping[str, Any], count: str = "n_active") -> dict[str, Any]:
    """n_layers, d_model and n_heads whose parameters (`count`), embeddings once when tied, come near to `n`. For a
    dense model n_active is n_total.

    Width over depth is near 32 (N/1e6)^0.15, at most 128: 22 at 1e5, 64 at 1e8, 128 from 1e10 on, between the
    published models (Hoffmann et al. 2022, table A9: 28 to 128). A law is fitted to the N that was found, so one family
    of shapes matters more than hitting N. Two layers at least: with one, attention cannot copy (Olsson et al. 2022),
    and the model is of another kind.

    Raises SpecError where no shape is within 15 %.
    """
    aspect = min(128.0, 32 * (n / 1e6) ** 0.15)
    best: tuple[float, float, dict[str, Any]] | None = None
    nearest = math.inf
    for found, size in _shapes(n, model, count):
        miss = abs(math.log(size / n))
        nearest = min(
            nearest, size, key=lambda each: abs(math.log(each / n)) if each < math.inf else math.inf
        )
        score = 2 * miss + abs(math.log(found["d_model"] / found["n_layers"] / aspect))
        if miss <= MISS and (best is None or score < best[0]):
            best = (score, size, found)
    if best is None:
        vocabulary = ModelConfig(**model).vocab_size
        raise SpecError(
            f"no model of {n:.4g} parameters: the nearest has {nearest:.4g}, with a vocabulary of {vocabulary}",
            "choose an N that is nearer, or a smaller model.vocab_size (and data.tokenizer.vocab_size)",
        )
    return best[2]


def experts(n_active: float, n_total: float, model: Mapping[str, Any]) -> int:
    """How many experts give the shape of `n_active` a total nearest to `n_total`: more than a token passes through.

    Args:
        model: what is fixed, with a section `moe`.

    Raises SpecError where no shape has that n_active.
    """
    shaped = {**model, **shape(n_active, model)}
    least = ModelConfig(**shaped).moe.chosen + 1  # type: ignore[union-attr]
    few, more = (
        _count({**shaped, "moe": {**model["moe"], "experts": e}}, "n_total") for e in (least, least + 1)
    )
    return least + max(0, round((n_total - few) / (more - few)))


def _shapes(n: float, model: Mapping[str, Any], count: str) -> Iterator[tuple[dict[str, Any], int]]:
    """For each width the two depths around `n`: parameters are linear in depth, counted in whole periods of the pattern
    of layers with experts.
    """
    period = int((model.get("moe") or {}).get("every", 1))
    least_depth = -(-MIN_LAYERS // period) * period
    for width in _widths():
        head = model.get("head_dim") or _head_size(width)
        if width % head:
            continue
        found = {"d_model": width, "n_heads": model.get("n_heads") or width // head}
        try:
            least, more = (
                _count({**model, **found, "n_layers": depth}, count)
                for depth in (least_depth, least_depth + period)
            )
        except ValidationError:  # heads that do not divide
            continue
        if least > 2 * n:
            return
        deeper = max(0, int((n - least) / (more - least)))
        for extra in (deeper, deeper + 1):
            yield {**found, "n_layers": least_depth + extra * period}, least + extra * (more - least)


def _widths() -> Iterator[int]:
    """Multiples of the head size: 8 below 64, 16 below 128, 32 below 512, 64 below 2048, 128 beyond."""
    width = 16
    while width <= 32768:
        yield width
        width += _head_size(width)


def _head_size(width: int) -> int:
    """Heads of 64 and 128 are what attention kernels are made for; a narrow model would have one or two of them."""
    return next((size for limit, size in ((64, 8), (128, 16), (512, 32), (2048, 64)) if width < limit), 128)


def _count(model: Mapping[str, Any], count: str) -> int:
    return int(getattr(parameter_counts(ModelConfig(**model)), count))


# Batch and learning rate


def _tuning(base: Mapping[str, Any], n: int, length: float, context: int) -> dict[str, Any]:
    """Batch and learning rate by the fitted rule, where `base` has not fixed them."""
    training, workers = base.get("training", {}), int(base.get("resources", {}).get("workers", 1))
    optimizer = training.get("optimizer", {})
    rate = optimizer.get("learning_rate")
    sequences = training.get("batch_sequences")
    made: dict[str, Any] = {}
    if sequences is None:
        wanted = min(rule().batch_tokens(length), length / MIN_STEPS) / context
        unit = workers * (
            1 if wanted < 32 * workers else 8
        )  # no coarser: a jump in the batch is one in the law
        sequences = max(unit, unit * round(wanted / unit))
        made["batch_sequences"] = sequences
    if rate is None:
        value = rule().learning_rate(n, length, sequences * context)
        if optimizer.get("schedule") in STEADY:
            value *= STEADY_RATE
        made["optimizer"] = {"learning_rate": float(f"{value:.3g}")}
    return made


@dataclass(frozen=True)
class Rule:
    """lr* = A N^p D^q (B/B*)^r and B* = E D^s, in tokens: the form of Li et al. 2025, "Predictable Scale: Part I",
    with the batch's own term, since a batch is rounded. `notes`: what the table says less than well.
    """

    log_a: float
    p: float
    q: float
    r: float
    log_e: float
    s: float
    notes: tuple[str, ...] = ()

    def batch_tokens(self, tokens: float) -> float:
        """Tokens of the best batch for a run of `tokens`."""
        return math.exp(self.log_e + self.s * math.log(tokens))

    def learning_rate(self, n_total: float, tokens: float, batch_tokens: float) -> float:
        """The best peak learning rate for that run at that batch."""
        off = math.log(batch_tokens / self.batch_tokens(tokens))
        return math.exp(self.log_a + self.p * math.log(n_total) + self.q * math.log(tokens) + self.r * off)


PUBLISHED = {"p": -0.713, "q": 0.307, "s": 0.571}  # Li et al. 2025, equation 1
PUBLISHED_SD = 0.2  # how far from them our scale may be, as a prior: a handful of cells fix no exponent alone
OPTIMUM_SD = 0.3  # of the logarithm of a cell's best learning rate or batch, as read off its grid
NEAR = 0.05  # a loss so much above a cell's best counts for 1/e: far from its bottom a bowl is no parabola


@lru_cache(maxsize=1)
def rule() -> Rule:
    """The rule fitted to the kept table. Raises SpecError where there is none."""
    try:
        with TABLE.open() as file:
            return fit_rule(list(csv.DictReader(file)))
    except FileNotFoundError:
        raise SpecError(
            f"there is no table of tuned learning rates at {TABLE}",
            "set training.optimizer.learning_rate and training.batch_sequences, or make the table: "
            "`escala sweep learning_rate`, then its points as CSV",
        ) from None


def fit_rule(rows: Iterable[Mapping[str, Any]]) -> Rule:
    """Fit the rule to a search: each cell (N, D) is a bowl in (log learning rate, log batch), whose bottom is read
    off a quadratic; the bottoms' exponents are a regression, shrunk towards the published ones (a normal prior).

    Args:
        rows: n_total, tokens, batch_tokens, learning_rate, loss_nats of each run.

    Raises SpecError for a table without a cell of at least six usable runs.
    """
    cells: dict[tuple[float, float], list[tuple[float, float, float]]] = {}
    for row in rows:
        n, d, b, rate, loss = (
            float(row[k]) for k in ("n_total", "tokens", "batch_tokens", "learning_rate", "loss_nats")
        )
        cells.setdefault((n, d), []).append((math.log(rate), math.log(b), loss))
    bowls = {key: _bowl(np.array(runs)) for key, runs in cells.items()}
    usable = {key: bowl for key, bowl in bowls.items() if bowl is not None}
    if not usable:
        raise SpecError("no (N, D) of the table has six runs", "widen the search")
    notes = [f"N={n:.3g}, D={d:.3g}: {bowl.note}" for (n, d), bowl in usable.items() if bowl.note]
    notes += [f"N={n:.3g}, D={d:.3g}: fewer than six runs" for (n, d) in bowls if (n, d) not in usable]
    sizes = np.log(np.array(list(usable)))
    batches = np.array([bowl.log_batch for bowl in usable.values()])
    rates = np.array([bowl.log_rate for bowl in usable.values()])
    log_e, (s,) = _shrunk(sizes[:, 1:], batches, np.array([PUBLISHED["s"]]))
    log_a, (p, q) = _shrunk(sizes, rates, np.array([PUBLISHED["p"], PUBLISHED["q"]]))
    r = float(np.clip(np.median([bowl.slope for bowl in usable.values()]), 0.0, 1.0))
    return Rule(log_a, float(p), float(q), r, log_e, float(s), tuple(notes))


@dataclass(frozen=True)
class _Bowl:
    """The bottom of a cell; `slope`: d log lr* / d log B along it."""

    log_rate: float
    log_batch: float
    slope: float
    note: str


def _bowl(runs_R3: np.ndarray) -> _Bowl | None:
    """A quadratic in (x, y) = (log lr, log B) by least squares, a run's weight by how near its loss is to the best."""
    runs_R3 = runs_R3[np.isfinite(runs_R3[:, 2])]
    if len(runs_R3) < 6:
        return None
    loss = runs_R3[:, 2]
    root = np.exp(-0.5 * (loss / loss.min() - 1) / NEAR)  # of the weight
    centre = runs_R3[:, :2].mean(axis=0)
    x, y = (runs_R3[:, :2] - centre).T
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    _, bx, by, axx, axy, ayy = np.linalg.lstsq(terms * root[:, None], loss * root, rcond=None)[0]
    best = runs_R3[loss.argmin(), :2] - centre
    if axx <= 0:
        return _Bowl(best[0] + centre[0], best[1] + centre[1], 0.5, "not a bowl: its best run stands for it")
    slope, bottom = -axy / (2 * axx), ayy - axy * axy / (4 * axx)
    free = -(by - axy * bx / (2 * axx)) / (2 * bottom) if bottom > 0 else best[1]
    batch = float(np.clip(free, y.min(), y.max()))
    rate = float(np.clip(-bx / (2 * axx) + slope * batch, x.min(), x.max()))
    found = (("batch", batch, y), ("learning rate", rate, x))
    edge = [name for name, value, ends in found if value in (ends.min(), ends.max())]
    note = f"the best {' and '.join(edge)} at the grid's edge" if edge else ""
    return _Bowl(rate + centre[0], batch + centre[1], float(slope), note)


def _shrunk(x_CK: np.ndarray, y_C: np.ndarray, prior_K: np.ndarray) -> tuple[float, np.ndarray]:
    """Intercept and slopes of y on x, the slopes with a normal prior (ridge regression towards `prior_K`)."""
    mean_x, mean_y = x_CK.mean(axis=0), float(y_C.mean())
    x, y = x_CK - mean_x, y_C - mean_y
    strength = (OPTIMUM_SD / PUBLISHED_SD) ** 2
    slopes = prior_K + np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ (y - x @ prior_K))
    return mean_y - float(mean_x @ slopes), slopes
