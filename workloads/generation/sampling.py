"""One token for each row of logits, the whole batch at once, each row by its own parameters and random numbers.

A row's random number is a function of its seed and of how many tokens it has drawn, so neither the batch nor a
preemption changes what it draws. Only what some row asks for is computed, and a row's result never depends on what
another one asks for.

Dimensions: N rows, V vocabulary (padded with -inf), C candidates, the most probable tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workloads.generation.protocol import SamplingParams

CANDIDATES = (
    256  # sorting these is enough for most nuclei; a whole vocabulary of 8,192 takes ten times as long
)
# SplitMix64's constants, as the signed numbers with the same bits: int64 wraps as uint64 does, which torch can't shift.
GOLDEN, MIX_1, MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Draw:
    """What one row is to draw by.

    Args:
        drawn: how many tokens the request has drawn before.
        seen: the tokens of prompt and response, where there is a repetition penalty.
    """

    params: SamplingParams
    drawn: int
    seen: Iterable[int] = ()


def uniforms(seeds: Sequence[int], counters: Sequence[int]) -> Tensor:
    """One float64 in (0, 1) for each (seed, counter): SplitMix64's finaliser on both (Steele et al. 2014). On the CPU:
    the same on every device.
    """
    state = _mix(torch.tensor(seeds, dtype=torch.int64) + GOLDEN)
    state = _mix(state + (torch.tensor(counters, dtype=torch.int64) + 1) * GOLDEN)
    return (_shifted(state, 32).double() + 0.5) / 2**32


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * MIX_1
    x = (x ^ _shifted(x, 27)) * MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of unsigned numbers: zeros come in from the left."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def sample(logits_NV: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[float]]:
    """The token of each row of fp32 logits, and its log-probability under softmax(logits / temperature).

    A row whose parameters leave no finite distribution gets NaN as its log-probability, and a token without meaning;
    the others are what they would be without it.
    """
    params, device = [d.params for d in draws], logits_NV.device
    greedy = torch.tensor([p.temperature == 0 for p in params], device=device)
    temperatures = [[float(p.temperature) or 1.0] for p in params]
    temperature_N1 = torch.tensor(temperatures, dtype=logits_NV.dtype, device=device)
    scaled = any(p.temperature not in (0, 1) for p in params)
    plain_NV = logits_NV / temperature_N1 if scaled else logits_NV
    drawn_NV = plain_NV
    if any(p.repetition_penalty != 1 for p in params):
        drawn_NV = _penalised(logits_NV, draws) / temperature_N1
    if all(p.temperature == 0 for p in params):
        tokens_N = drawn_NV.argmax(-1)
    else:
        tokens_N = torch.where(greedy, drawn_NV.argmax(-1), _draw(drawn_NV, draws))
    tokens_N = tokens_N.clamp(max=logits_NV.shape[1] - 1)  # a search in NaN ends beyond the last
    logprobs = _logprobs(plain_NV, tokens_N)
    if drawn_NV is not plain_NV:
        finite = drawn_NV.amax(-1).isfinite().tolist()
        logprobs = [p if good else math.nan for p, good in zip(logprobs, finite, strict=True)]
    return tokens_N.tolist(), logprobs


def _logprobs(logits_NV: Tensor, tokens_N: Tensor) -> list[float]:
    """Of each row's token under softmax; NaN where it is not finite. The logarithm is Python's: torch takes that of a
    tensor's last numbers by other code than that of the first, with other bits.
    """
    top_N1 = logits_NV.amax(-1, keepdim=True)
    sums_N = (logits_NV - top_N1).exp_().sum(-1)
    above_N = logits_NV.gather(1, tokens_N[:, None]).squeeze(1) - top_N1.squeeze(1)
    found = (x - math.log(total) for x, total in zip(above_N.tolist(), sums_N.tolist(), strict=True))
    return [p if math.isfinite(p) else math.nan for p in found]


def _penalised(logits_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits with those of seen tokens divided by the penalty where positive, multiplied where negative."""
    penalised_NV = logits_NV.clone()
    for row, draw in enumerate(draws):
        penalty = draw.params.repetition_penalty
        if penalty != 1:
            seen = torch.tensor(sorted(set(draw.seen)), dtype=torch.long, device=logits_NV.device)
            values = logits_NV[row, seen]
            penalised_NV[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return penalised_NV


def _draw(logits_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token of each row by the inverse of its cumulative distribution, in fp64: a vocabulary's worth of fp32
    roundings would favour the last tokens.
    """
    weights_NV = (logits_NV - logits_NV.amax(-1, keepdim=True)).exp_()
    if any(p.top_k or p.top_p < 1 or p.min_p for p in (d.params for d in draws)):
        weights_NV.masked_fill_(logits_NV < _cutoff(logits_NV, draws), 0.0)
    cumulative_NV = weights_NV.cumsum(-1, dtype=torch.float64)
    u_N = uniforms([d.params.seed for d in draws], [d.drawn for d in draws])
    target_N1 = cumulative_NV[:, -1:] * u_N.to(logits_NV.device).unsqueeze(1)
    return torch.searchsorted(cumulative_NV, target_N1, right=True).squeeze(1)


def _cutoff(logits_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The smallest logit that top-k, top-p and min-p leave, cutoff_N1."""
    params, vocabulary = [d.params for d in draws], logits_NV.shape[1]
    width = min(vocabulary, max(CANDIDATES, *(p.top_k for p in params)))
    cutoff_N1, enough = _cutoff_among(logits_NV.topk(width).values, logits_NV, params)
    if not enough and width < vocabulary:
        cutoff_N1, _ = _cutoff_among(logits_NV.sort(descending=True).values, logits_NV, params)
    return cutoff_N1


def _cutoff_among(
    sorted_NC: Tensor, logits_NV: Tensor, params: Sequence[SamplingParams]
) -> tuple[Tensor, bool]:
    """The cutoff by a row's largest logits, and whether they were enough: no nucleus ends beyond the last."""
    device = logits_NV.device
    infinity = float("inf")
    last = torch.tensor([[(p.top_k or logits_NV.shape[1]) - 1] for p in params], device=device)
    top_p_N1 = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=device)
    smallest = sorted_NC.gather(1, last.clamp(max=sorted_NC.shape[1] - 1))
    by_k_N1 = torch.where(last < sorted_NC.shape[1], smallest, -infinity)
    kept_NV = logits_NV.masked_fill(logits_NV < by_k_N1, -infinity)
    total_N1 = kept_NV.logsumexp(-1, keepdim=True).double()
    mass_NC = (sorted_NC.double() - total_N1).exp_().masked_fill_(sorted_NC < by_k_N1, 0.0)
    before_NC = mass_NC.cumsum(-1) - mass_NC
    inside_NC = (before_NC < top_p_N1) & (sorted_NC >= by_k_N1)
    by_p_N1 = sorted_NC.masked_fill(~inside_NC, infinity).amin(-1, keepdim=True)
    by_p_N1 = torch.where(top_p_N1 < 1, by_p_N1, -infinity)
    log_min_p = [[math.log(p.min_p) if p.min_p else -infinity] for p in params]
    by_min_p_N1 = sorted_NC[:, :1] + torch.tensor(log_min_p, device=device)
    enough = bool((~inside_NC[:, -1:] | (top_p_N1 == 1)).all())
    return torch.maximum(torch.maximum(by_k_N1, by_p_N1), by_min_p_N1), enough
