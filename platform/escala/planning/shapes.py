"""What the recipe's shapes cost at N and T with a kind of attention: chi, and the memory that bounds N and T.

`model` is what all shapes share: the `model` section of a configuration without what the recipe decides.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from escala import spec
from escala.contract.errors import LawError, SpecError
from escala.laws.powers import Floats
from escala.planning import cost
from escala.planning.curve import Curve
from escala.planning.limits import Chi
from escala.schema import ModelConfig, PretrainConfig
from escala.schema.flops import flops_per_token, parameter_counts
from escala.schema.hardware import Cluster, Precision
from escala.sweeps import recipes

OF_ATTENTION = ("attention", "window_tokens", "features")  # the keys of `model` that say which kind it is
CONTEXTS = np.unique(np.round(np.geomspace(1, 2**24, 24 * 8 + 1))).astype(
    int
)  # 8 an octave: knots of chi over T
PROPORTIONAL = 1e-6  # a kind whose cost is so near to one in proportion to T has no curve of its own
SIZES = np.geomspace(1e5, 1e12, 15)  # N_total whose memory is counted; between them it is interpolated
FITS_PER_OCTAVE = 4  # contexts at which the largest model is looked for


def with_attention(model: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """`model` with another kind of attention: a name, then keys of `model` as an override has them, e.g.
    `hybrid,window_tokens=512,features.count=128`. What `model` says of its own kind stays where that is the same.

    Raises SpecError for what is no kind or no option.
    """
    name, *options = (part.strip() for part in kind.split(","))
    stated = ModelConfig(**{key: model[key] for key in OF_ATTENTION if key in model}).attention.kind
    kept = {key: value for key, value in model.items() if name == stated or key not in OF_ATTENTION}
    section = {"model": kept if name == stated else {**kept, "attention": {"kind": name}}}
    for option in options:
        if re.split(r"[.=]", option)[0] not in OF_ATTENTION:
            raise SpecError(
                f"{option!r} of --attention {kind} is no option of attention",
                "hybrid,window_tokens=512,features.count=128, or nystrom,attention.landmarks=8",
            )
    found = spec.written((), [f"model.{option}" for option in options], section)["model"]
    spec.validate(
        ModelConfig, {key: found[key] for key in OF_ATTENTION if key in found}, "--attention", "model."
    )
    return dict(found)


def described(model: Mapping[str, Any]) -> str:
    """Its kind of attention, in words."""
    return ModelConfig(**{key: model[key] for key in OF_ATTENTION if key in model}).attention_words


def reach(model: Mapping[str, Any]) -> str:
    """How far a token sees, in words, where its kind bounds that; else empty (docs/theory A.6)."""
    checked = ModelConfig(**{key: model[key] for key in OF_ATTENTION if key in model})
    if checked.window_tokens is None or checked.attention.has_far_part:
        return ""
    return f"; a token of it reaches back layers x {checked.window_tokens - 1} tokens at most"


def chi_of(model: Mapping[str, Any], sizes: tuple[float, float], context: float) -> Chi:
    """chi(N, T): attention's share of the FLOPs (docs/theory D.2) over N by regression, over T as the kind says.

    Args:
        sizes: of N, from the least to a hundredth of the largest shape.
        context: T at which the share over N is exact.
    """
    low, high = sizes
    tokens = max(1, round(context))
    built = list(_built(model, np.geomspace(low, 100 * high, 9), "n_active"))
    counts = [parameter_counts(each).n_active for each in built]
    shares = [
        flops_per_token(each, tokens).attention / tokens / 6 / n
        for each, n in zip(built, counts, strict=True)
    ]
    if len(counts) < 2:  # no shapes so small
        return Chi()
    slope, intercept = np.polyfit(np.log(counts), np.log(shares), 1)
    growth = _growth(built[len(built) // 2], tokens)
    return Chi(math.exp(float(intercept)), min(1.0, max(0.0, -float(slope))), growth)


def _growth(model: ModelConfig, tokens: int) -> Curve | None:
    """How the cost of a token's attention grows with T, `tokens` at T = `tokens`; None where in proportion."""
    work = [flops_per_token(model, int(t)).attention for t in CONTEXTS]
    found = Curve.through(
        CONTEXTS.tolist(), [w * tokens / flops_per_token(model, tokens).attention for w in work]
    )
    return None if np.ptp(np.subtract(found.log_y, found.log_x)) < PROPORTIONAL else found


@lru_cache(maxsize=8)
def _sizes(model: str) -> tuple[ModelConfig, ...]:
    """The recipe's models of SIZES, of a `model` as JSON: the same for the bounds of a plan and for what it says."""
    return tuple(_built(json.loads(model), SIZES, "n_total"))


def _built(
    model: Mapping[str, Any], sizes: Sequence[float] | np.ndarray, count: str
) -> Iterator[ModelConfig]:
    """The recipe's models near `sizes`; where there is none, the others tell enough."""
    for n in sizes:
        try:
            yield ModelConfig(**{**model, **recipes.shape(float(n), model, count)})
        except SpecError:
            continue


def largest_models(
    model: Mapping[str, Any],
    cluster: Cluster,
    precision: Precision,
    limit_bytes: float,
    contexts: Sequence[int],
) -> list[float | None]:
    """The largest N_total whose training fits in `limit_bytes` of a device at each context: ZeRO-3 over all devices,
    one sequence at a time, activations checkpointed. None where no model does.
    """
    log_n_K, log_bytes_TK = _memory(model, cluster, precision, contexts)
    limit = math.log(limit_bytes)
    return [
        math.exp(np.interp(limit, log_bytes_K, log_n_K)) if log_bytes_K[0] <= limit else None
        for log_bytes_K in log_bytes_TK
    ]


def memory_curve(
    model: Mapping[str, Any],
    cluster: Cluster,
    precision: Precision,
    limit_bytes: float,
    contexts: tuple[float, float],
) -> Curve:
    """`largest_models` over a range of contexts, up to the longest at which a model trains. Raises LawError where even
    the shortest leaves none.
    """
    low, high = contexts
    count = 2 + math.ceil(FITS_PER_OCTAVE * math.log2(high / low))
    tokens = np.unique(np.round(np.geomspace(low, high, count))).astype(int).tolist()
    most = largest_models(model, cluster, precision, limit_bytes, tokens)
    fitting = [(t, n) for t, n in zip(tokens, most, strict=True) if n is not None]
    if not fitting:
        raise no_model(limit_bytes, tokens[0])
    if len(fitting) == 1:  # a curve has two ends: to the next token
        fitting.append((fitting[0][0] + 1, fitting[0][1]))
    return Curve.through(*zip(*fitting, strict=True))


def no_model(limit_bytes: float, tokens: float) -> LawError:
    """Nothing trains in so little memory."""
    return LawError(
        f"No model trains on a sequence of {tokens:g} tokens in {limit_bytes / 1e9:g} GB a device.",
        "Raise --max-memory-gb.",
    )


def memory_of(
    model: Mapping[str, Any], cluster: Cluster, precision: Precision, n_total: float, context: float
) -> float:
    """Bytes of a device in training, as `largest_models` has it."""
    log_n_K, log_bytes_TK = _memory(model, cluster, precision, [round(context)])
    return math.exp(np.interp(math.log(n_total), log_n_K, log_bytes_TK[0]))


def state_of(model: Mapping[str, Any], precision: Precision, n_total: float, context: float) -> float | None:
    """Bytes that generation keeps of one sequence; None where the recipe has no shape of that N."""
    for each in _built(model, [n_total], "n_total"):
        return cost.state_bytes(each, round(context), 2 if precision == "bf16" else cost.FP32)
    return None


def _memory(
    model: Mapping[str, Any], cluster: Cluster, precision: Precision, contexts: Sequence[int]
) -> tuple[Floats, Floats]:
    """log N_total (K,) of the recipe's shapes, and the log of their bytes on a device at each context (T, K)."""
    training = {
        "zero_stage": 3,
        "activation_checkpointing": True,
        "precision": precision,
        "batch_sequences": cluster.devices,
        "micro_batch_sequences": 1,
    }
    log_n, log_bytes = list[float](), list[list[float]]()
    longest = {"max_context_tokens": max(contexts)}
    for each in (shape.model_copy(update=longest) for shape in _sizes(json.dumps(model, sort_keys=True))):
        data = {"tokenizer": {"vocab_size": min(4096, each.vocab_size)}}
        written = {
            "model": each,
            "data": data,
            "training": training,
            "resources": {"workers": cluster.devices},
        }
        config = PretrainConfig.model_validate(written)
        log_n.append(math.log(parameter_counts(each).n_total))
        at = [config.training.model_copy(update={"context_tokens": t}) for t in contexts]
        of_t = [
            cost.memory_bytes(config.model_copy(update={"training": t}), cluster.device).total for t in at
        ]
        log_bytes.append(np.log(of_t).tolist())
    return np.array(log_n), np.maximum.accumulate(np.array(log_bytes).T, axis=1)
