"""The engine's tokens: alone, in a batch, under preemption, and the CPU's.

On CUDA the batch's size may move a logit's last bits (see `workloads.generation.engine`). So where two runs of one
request part, the CPU must show that the two tokens were within that of each other: anything else fails.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.checks import CPU, each_precision, model_of, normal, tokens_of
from tests.gpu.figures import Figures
from workloads.generation.engine import Engine
from workloads.generation.protocol import Completion, SamplingParams
from workloads.generation.sampling import Draw, sample, uniforms

pytestmark = pytest.mark.gpu
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "window": {"window_tokens": 33},
    "experts": {"moe": {"experts": 4, "chosen": 2}},
    "features": {"attention": "features"},
    "learned": {"attention": "features", "features": {"kind": "learned", "count": 64}},
    "hybrid": {"attention": "hybrid", "window_tokens": 32},
    "nystrom": {"attention": {"kind": "nystrom", "landmarks": 4}, "window_tokens": 32},
}
REQUESTS, NEW = 12, 32
GREEDY = [SamplingParams(max_tokens=NEW, temperature=0)] * REQUESTS
SEEDED = [SamplingParams(max_tokens=NEW, temperature=0.8, seed=n) for n in range(REQUESTS)]
NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of logits that spread over about 1
PROMPTS = [tokens_of(512, 3 + 11 * n % 90, seed=n).tolist() for n in range(REQUESTS)]


def completions(
    name: str, device: torch.device, dtype: torch.dtype, params: list[SamplingParams], **limits: int
) -> list[Completion]:
    engine = Engine(model_of(device, dtype, **MODELS[name]), None, block_tokens=16, threads=None, **limits)
    return engine.generate(PROMPTS, params)


def partings(
    name: str, a: list[Completion], b: list[Completion], params: list[SamplingParams], near: float
) -> int:
    """How many requests part. Asserts that each does so at a near tie by the CPU's logits in fp32."""
    model, parted = model_of(CPU, torch.float32, **MODELS[name]).eval(), 0
    for prompt, one, other, param in zip(PROMPTS, a, b, params, strict=True):
        pairs = zip(one.token_ids, other.token_ids, strict=True)
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if at is None:
            continue
        parted += 1
        text = torch.tensor([[*prompt, *one.token_ids[:at]]])
        with torch.inference_mode():
            logits = model(text)[0, -1].double()
        x, y = one.token_ids[at], other.token_ids[at]
        assert is_near_tie(logits, x, y, param, at, near), (prompt, at, x, y)
    return parted


def is_near_tie(logits: torch.Tensor, x: int, y: int, param: SamplingParams, drawn: int, near: float) -> bool:
    """Whether logits that differ by `near` could draw either token."""
    if param.temperature == 0:
        return bool(abs(logits[x] - logits[y]) <= near)
    shares = (logits / param.temperature).softmax(-1)
    ends, u = shares.cumsum(-1), float(uniforms([param.seed], [drawn])[0])
    low, high = sorted((x, y))
    slack = near / param.temperature  # a factor of 1 + slack on any share
    return bool(
        float(ends[low]) >= u * (1 - slack) - slack * 0.1
        and float(ends[high - 1]) <= u * (1 + slack) + slack * 0.1
    )


@each_precision
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_alone_and_in_a_batch(
    name: str, params: list[SamplingParams], device: torch.device, dtype: torch.dtype, figures: Figures
) -> None:
    """The batch of all, with a cache so small that some are preempted."""
    batch = completions(name, device, dtype, params, max_running=REQUESTS, cache_tokens=1024)
    again = completions(name, device, dtype, params, max_running=REQUESTS, cache_tokens=1024)
    assert [c.token_ids for c in again] == [c.token_ids for c in batch], "two equal runs differ"
    alone = completions(name, device, dtype, params, max_running=1)
    parted = partings(name, alone, batch, params, NEAR[dtype])
    kind = "greedy" if params is GREEDY else "seeded"
    figures.add(
        f"engine, {name}, {kind}, {str(dtype)[6:]}: requests whose tokens depend on the batch",
        f"{parted} of {REQUESTS}",
        "0, or near ties",
    )
    assert dtype == torch.bfloat16 or parted <= 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_cpu_s_tokens(name: str, params: list[SamplingParams], device: torch.device) -> None:
    wanted = completions(name, CPU, torch.float32, params, max_running=REQUESTS)
    found = completions(name, device, torch.float32, params, max_running=REQUESTS)
    assert partings(name, wanted, found, params, NEAR[torch.float32]) <= 1
    for one, other in zip(wanted, found, strict=True):
        if one.token_ids == other.token_ids:
            assert other.logprobs == pytest.approx(one.logprobs, abs=1e-3)


def test_sampling_from_the_same_logits(device: torch.device) -> None:
    """All filters, on rows as the engine has them; equal logits among them, of which greedy takes the lowest id."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 20},
        {"top_p": 0.9},
        {"temperature": 1.3, "min_p": 0.05},
        {"top_k": 300, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2},
    ]
    logits = (2 * normal(240, 8192)).bfloat16().float()  # bf16: many are equal
    logits[:, 8190:] = float("-inf")
    draws = [Draw(SamplingParams(seed=n, **kinds[n % len(kinds)]), n % 7, range(50)) for n in range(240)]
    wanted, wanted_logprobs = sample(logits, draws)
    found, logprobs = sample(logits.to(device), draws)
    assert found == wanted
    assert logprobs == pytest.approx(wanted_logprobs, abs=1e-4)
    assert [t for t, d in zip(found, draws, strict=True) if d.params.temperature == 0] == [
        int(row.argmax()) for row, d in zip(logits, draws, strict=True) if d.params.temperature == 0
    ]


def test_new_weights(device: torch.device) -> None:
    """What the engine has laid out for itself follows `load_weights`."""
    engine = Engine(model_of(device, torch.float32), None, block_tokens=16, threads=None)
    before = engine.generate(PROMPTS, GREEDY)
    state = {
        n: -w.cpu() if "down" in n else w.cpu() for n, w in model_of(CPU, torch.float32).state_dict().items()
    }
    engine.load_weights(state, 1)
    changed = model_of(device, torch.float32)
    changed.load_state_dict(state)
    fresh = Engine(changed, None, block_tokens=16, threads=None)
    found = engine.generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in found] == [c.token_ids for c in fresh.generate(PROMPTS, GREEDY)]
    assert [c.token_ids for c in found] != [c.token_ids for c in before]
