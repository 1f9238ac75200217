"""Our own engine's cache and accounts: what it cannot hold, what is queued, no block lost in a thousand requests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import escala.schema.engines
import workloads.generation.engines
from escala.contract.errors import SpecError
from escala.schema import ModelConfig
from escala.schema.engines import KINDS
from escala.schema.serve import ServeConfig
from tests.kind_files import kind_of_two_files
from workloads.generation.engine import Engine
from workloads.generation.engines import make_engine
from workloads.generation.protocol import EngineProtocol, Output, Request, SamplingParams
from workloads.model.transformer import Transformer

VOCAB = 300
SMALL = {
    "vocab_size": VOCAB,
    "n_layers": 1,
    "d_model": 32,
    "n_heads": 2,
    "d_ff": 32,
    "max_context_tokens": 64,
}


def engine_of(**options: object) -> Engine:
    torch.manual_seed(0)
    return Engine(Transformer(ModelConfig(**SMALL)), None, **{"block_tokens": 4, **options})


def run(engine: EngineProtocol) -> dict[str, list[Output]]:
    """All outputs by request."""
    found: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    return found


def test_a_request_that_the_cache_cannot_hold_is_refused() -> None:
    engine = engine_of(cache_tokens=32)
    with pytest.raises(SpecError, match="cache holds 33"):
        engine.add(Request("a", (1,) * 20, SamplingParams(max_tokens=14)))
    assert not engine.has_work


def test_blocks_that_attention_cannot_have_are_refused() -> None:
    """And a constant state needs a few of them, however long the context is."""
    model = Transformer(
        ModelConfig(**{**SMALL, "max_context_tokens": 4096}, attention="hybrid", window_tokens=16)
    )
    with pytest.raises(SpecError, match=r"blocks of 4 tokens: its own are of 8") as caught:
        Engine(model, None, block_tokens=4)
    assert "set it to 8" in caught.value.hint
    engine = Engine(model, None, cache_tokens=24)
    assert (engine.stats().total_blocks, engine.cache.block_tokens) == (3, 8)
    engine.add(Request("a", (1,) * 300, SamplingParams(max_tokens=3)))
    assert sum(len(o.token_ids) for o in run(engine)["a"]) == 3
    with pytest.raises(SpecError, match="cache holds 17"):
        Engine(model, None, cache_tokens=16).add(Request("a", (1,) * 16, SamplingParams(max_tokens=2)))
    short = Transformer(ModelConfig(**SMALL, attention="hybrid"))
    assert Engine(short, None, max_running=2).stats().total_blocks == 2


def test_the_whole_cache_may_be_one_request_and_ids_are_unique_until_reported() -> None:
    engine = engine_of(cache_tokens=32)
    engine.add(Request("a", (1,) * 20, SamplingParams(max_tokens=13)))
    with pytest.raises(SpecError, match="id is in use"):
        engine.add(Request("a", (1,), SamplingParams(max_tokens=2)))
    assert sum(len(o.token_ids) for o in run(engine)["a"]) == 13
    engine.add(Request("a", (1,), SamplingParams(max_tokens=2)))
    assert engine.cancel("a")
    with pytest.raises(SpecError, match="id is in use"):
        engine.add(Request("a", (1,), SamplingParams(max_tokens=2)))
    engine.step()
    engine.add(Request("a", (1,), SamplingParams(max_tokens=2)))
    with pytest.raises(SpecError, match="cannot run"):
        engine_of(cache_tokens=3)


def test_queued_tokens_count_down_to_nothing() -> None:
    engine = engine_of(max_running=1, prefill_tokens=4)
    for name in "ab":
        engine.add(Request(name, (1,) * 10, SamplingParams(max_tokens=5)))
    counts = [engine.stats().queued_tokens]
    while engine.has_work:
        engine.step()
        counts.append(engine.stats().queued_tokens)
    assert counts[0] == 30
    assert counts[1] == 26
    assert counts[-1] == 0
    assert counts == sorted(counts, reverse=True)
    stats = engine.stats()
    assert (stats.generated_tokens, stats.finished, stats.waiting, stats.running) == (10, 2, 0, 0)
    assert stats.prompt_tokens + stats.cached_prompt_tokens == 20


def test_no_block_is_lost_in_a_thousand_requests_with_cancellations() -> None:
    engine, rng, unfinished, reasons = engine_of(cache_tokens=48, max_running=6), random.Random(0), [], {}
    for number in range(1000):
        family = rng.randrange(3)
        prompt = tuple([family] * rng.randint(1, 16))
        params = SamplingParams(max_tokens=rng.randint(1, 12), seed=number)
        engine.add(Request(str(number), prompt, params))
        unfinished.append(str(number))
        if rng.random() < 0.3:
            engine.cancel(rng.choice(unfinished))
        for output in engine.step() if rng.random() < 0.9 else ():
            if output.finish_reason:
                assert output.request_id not in reasons
                reasons[output.request_id] = output.finish_reason
                unfinished.remove(output.request_id)
    for name, outputs in run(engine).items():
        assert name not in reasons
        reasons[name] = outputs[-1].finish_reason
    stats = engine.stats()
    assert len(reasons) == 1000
    assert set(reasons.values()) == {"length", "cancelled"}
    assert stats.free_blocks == stats.total_blocks == 12
    assert stats.preemptions > 0
    assert stats.cached_prompt_tokens > 0
    assert stats.finished == sum(reason == "length" for reason in reasons.values())


SCHEMA = """
    from typing import Literal

    from escala.schema.engines.kind import KINDS, EngineKind


    @KINDS.add
    class SerialEngineConfig(EngineKind):
        kind: Literal["serial"] = "serial"
        page_tokens: int = 8
"""
IMPLEMENTATION = """
    from workloads.generation.engine import Engine


    class SerialEngine(Engine):
        pass


    def make_engine(section, model, tokenizer, kernels, smaller, capacity_factor):
        return SerialEngine(
            model,
            tokenizer,
            max_running=1,
            block_tokens=section.page_tokens,
            kernels=kernels,
            smaller=smaller,
            capacity_factor=capacity_factor,
        )
"""


@pytest.fixture
def serial_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A kind of two files: its schema and what makes it."""
    files = {escala.schema.engines: SCHEMA, workloads.generation.engines: IMPLEMENTATION}
    with kind_of_two_files("serial", KINDS, files, tmp_path, monkeypatch) as kind:
        yield kind


def test_a_new_kind_of_engine_is_two_files(serial_kind: str) -> None:
    config = ServeConfig(model="/m", engine={"kind": "serial", "page_tokens": 4, "max_running": 3})
    plain = config.model_dump(mode="json")
    assert plain["engine"] == {
        "kind": "serial",
        "page_tokens": 4,
        "max_running": 3,
        "max_response_tokens": 4096,
    }
    assert ServeConfig(**plain) == config
    assert config.autoscaling()["target_ongoing_requests"] == 3.0
    own = engine_of()
    torch.manual_seed(0)
    engine = make_engine(config.engine, Transformer(ModelConfig(**SMALL)), None)
    assert type(engine).__name__ == "SerialEngine"
    params = SamplingParams(max_tokens=5, seed=1)
    assert engine.generate([[1, 2, 3]], params) == own.generate([[1, 2, 3]], params)
