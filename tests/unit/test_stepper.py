"""The engine behind asyncio: responses, streams, cancellation, weights between responses, and its death."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from escala.contract.errors import SpecError, StateError
from escala.schema import ModelConfig
from workloads.generation.engine import Engine
from workloads.generation.protocol import SamplingParams
from workloads.model.transformer import Transformer
from workloads.serving.stepper import Stepper

CONFIG = ModelConfig(vocab_size=64, n_layers=1, d_model=32, n_heads=2, max_context_tokens=128)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def model(seed: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG).eval()


def run(test: Callable[[Stepper], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def sync() -> None:
        async def main() -> None:
            stepper = Stepper(Engine(model(0), None, max_running=4))
            try:
                await asyncio.wait_for(test(stepper), 30)
            finally:
                await stepper.close()

        asyncio.run(main())

    return sync


def expected(seed: int, prompt: list[int], params: SamplingParams = GREEDY) -> tuple[int, ...]:
    return Engine(model(seed), None).generate([prompt], params)[0].token_ids


@run
async def test_many_at_once_get_what_each_would_get_alone(stepper: Stepper) -> None:
    prompts = [[i + 1, i + 2, i + 3] for i in range(12)]
    found = await asyncio.gather(*(stepper.complete(prompt, GREEDY) for prompt in prompts))
    assert [c.token_ids for c in found] == [expected(0, prompt) for prompt in prompts]
    assert {len(c.logprobs) for c in found} == {12}
    assert stepper.tokens_per_second > 0
    assert stepper.stats.finished == 12


@run
async def test_a_stream_comes_in_pieces_and_leaving_it_frees_its_place(stepper: Stepper) -> None:
    stream = stepper.outputs([1, 2], SamplingParams(max_tokens=100))
    pieces = [await anext(stream) for _ in range(3)]
    assert all(len(p.token_ids) == 1 and p.finish_reason is None for p in pieces)
    await stream.aclose()
    await stepper.complete([1], GREEDY)
    assert (stepper.stats.running, stepper.stats.free_blocks) == (0, stepper.stats.total_blocks)


@run
async def test_weights_wait_for_started_responses_and_the_waiting_ones_run_on_them(stepper: Stepper) -> None:
    long = SamplingParams(max_tokens=60, temperature=0.0)
    first = [asyncio.create_task(stepper.complete([i + 1, 5], long)) for i in range(4)]  # a full batch
    stream = stepper.outputs([9, 9], long)
    while stepper.stats.started < 4:
        await asyncio.sleep(0.001)
    behind = [asyncio.create_task(stepper.complete([i + 1, 7], GREEDY)) for i in range(3)]
    await asyncio.sleep(0)
    await stepper.load(model(1).state_dict(), 7)
    assert all(task.done() for task in first)
    old, new = await asyncio.gather(*first), await asyncio.gather(*behind)
    assert [c.weights_version for c in [*old, *new]] == [0] * 4 + [7] * 3
    assert [c.token_ids for c in old] == [expected(0, [i + 1, 5], long) for i in range(4)]
    assert [c.token_ids for c in new] == [expected(1, [i + 1, 7]) for i in range(3)]
    await stream.aclose()


@run
async def test_a_request_that_can_never_run_is_refused_and_the_others_go_on(stepper: Stepper) -> None:
    other = asyncio.create_task(stepper.complete([3, 4], GREEDY))
    with pytest.raises(SpecError):
        await stepper.complete([], GREEDY)
    with pytest.raises(SpecError):
        await stepper.complete([1], SamplingParams(max_tokens=999))
    assert (await other).token_ids == expected(0, [3, 4])


@run
async def test_when_the_engine_dies_nobody_waits_for_ever(stepper: Stepper) -> None:
    waiting = [
        asyncio.create_task(stepper.complete([i + 1], SamplingParams(max_tokens=100))) for i in range(6)
    ]
    while not stepper.stats.running:
        await asyncio.sleep(0.001)

    def broken(admit: bool = True) -> list[Any]:
        raise RuntimeError("no such kernel")

    stepper.engine.step = broken  # type: ignore[method-assign]
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert all("no such kernel" in str(error) for error in found)
    with pytest.raises(StateError, match="no such kernel"):
        stepper.check()
    with pytest.raises(StateError):
        await stepper.complete([1], GREEDY)
    with pytest.raises(StateError):
        await stepper.load({}, 1)


@run
async def test_closing_ends_what_is_unfinished_with_an_error(stepper: Stepper) -> None:
    waiting = asyncio.create_task(stepper.complete([1], SamplingParams(max_tokens=100)))
    while not stepper.stats.running:
        await asyncio.sleep(0.001)
    await stepper.close()
    with pytest.raises(StateError, match="closed"):
        await waiting
