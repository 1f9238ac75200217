"""The engine's protocol: refusals, cancellation, streams, stops, draining, and no block lost in a thousand requests."""

from __future__ import annotations

import random

import pytest
import torch

from escala.contract.errors import CheckpointError, SpecError, StateError
from escala.schema import ModelConfig
from workloads.data.tokenizer import TextTokenizer, train_tokenizer, wrap
from workloads.generation.engine import Engine
from workloads.generation.protocol import EngineProtocol, Output, Request, SamplingParams
from workloads.model.transformer import Transformer

VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return wrap(train_tokenizer(["the cat sat on the mat and the dog ran after the cat"] * 5, VOCAB), "test")


def engine_of(tokenizer: TextTokenizer | None = None, **options: object) -> Engine:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=VOCAB, n_layers=1, d_model=32, n_heads=2, d_ff=32, max_context_tokens=64)
    return Engine(Transformer(config), tokenizer, **{"block_tokens": 4, **options})


def run(engine: EngineProtocol) -> dict[str, list[Output]]:
    """All outputs by request."""
    found: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    return found


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", (), SamplingParams()), "prompt is empty"),
        (Request("a", (1, VOCAB), SamplingParams()), "not of the vocabulary"),
        (Request("a", (1, -1), SamplingParams()), "not of the vocabulary"),
        (Request("a", (1,), SamplingParams(stop_token_ids=(VOCAB,))), "not of the vocabulary"),
        (Request("a", (1,) * 60, SamplingParams(max_tokens=5)), "context holds 64"),
        (Request("a", (1,) * 20, SamplingParams(max_tokens=14)), "cache holds 33"),
        (Request("a", (1,), SamplingParams(max_tokens=4, stop=("x",))), "no tokenizer"),
    ],
)
def test_what_can_never_run_is_refused(request_: Request, message: str) -> None:
    engine = engine_of(cache_tokens=32)
    with pytest.raises(SpecError, match=message):
        engine.add(request_)
    assert not engine.has_work


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


def test_cancelled_requests_are_reported_once_and_give_their_blocks_back() -> None:
    engine = engine_of(max_running=1)
    for name in ("running", "waiting"):
        engine.add(Request(name, (1, 2, 3), SamplingParams(max_tokens=50)))
    engine.step()
    assert engine.stats().free_blocks < engine.stats().total_blocks
    assert engine.cancel("running")
    assert engine.cancel("waiting")
    assert not engine.cancel("running")
    assert not engine.cancel("unknown")
    assert [(o.request_id, o.finish_reason, o.token_ids) for o in engine.step()] == [
        ("running", "cancelled", ()),
        ("waiting", "cancelled", ()),
    ]
    assert not engine.has_work
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_a_stream_put_together_is_the_whole_response(tokenizer: TextTokenizer) -> None:
    engine = engine_of(tokenizer)
    prompts = [tokenizer.encode([text])[0].tolist() for text in ("the cat", "a dog", "mat")]
    params = [SamplingParams(max_tokens=20, seed=n, ignore_eos=True) for n in range(3)]
    whole = engine.generate(prompts, params)
    for n in range(3):
        engine.add(Request(str(n), tuple(prompts[n]), params[n]))
    for name, outputs in run(engine).items():
        completion = whole[int(name)]
        assert len(outputs) == 20
        assert tuple(t for o in outputs for t in o.token_ids) == completion.token_ids
        assert (
            "".join(o.text for o in outputs)
            == completion.text
            == tokenizer.decode(list(completion.token_ids))
        )
        assert [o.finish_reason for o in outputs] == [None] * 19 + ["length"]


def test_stop_tokens_stop_strings_and_end_of_text(tokenizer: TextTokenizer) -> None:
    engine = engine_of(tokenizer)
    prompt = tokenizer.encode(["the cat"])[0].tolist()
    free = engine.generate([prompt], SamplingParams(max_tokens=20, seed=4, ignore_eos=True))[0]
    assert tokenizer.end_of_text not in free.token_ids
    token = free.token_ids[9]
    first = free.token_ids.index(token)
    stopped = engine.generate([prompt], SamplingParams(max_tokens=20, seed=4, stop_token_ids=(token,)))[0]
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.text == tokenizer.decode(list(free.token_ids[:first]))
    assert stopped.finish_reason == "stop"
    string = free.text[7:10]
    stopped = engine.generate([prompt], SamplingParams(max_tokens=20, seed=4, stop=(string,)))[0]
    assert stopped.text == free.text[: free.text.index(string)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert string in tokenizer.decode(list(stopped.token_ids))
    assert string not in tokenizer.decode(list(stopped.token_ids[:-1]))
    assert stopped.finish_reason == "stop"
    with torch.no_grad():  # a model that can only end
        weights = {n: torch.zeros_like(w) for n, w in engine._network.model.state_dict().items()}
    engine.load_weights(weights, 1)  # all logits 0: greedy takes token 0, the end of text
    assert tokenizer.end_of_text == 0
    ended = engine.generate([prompt], SamplingParams(max_tokens=5, temperature=0))[0]
    assert (ended.token_ids, ended.text, ended.finish_reason) == ((0,), "", "stop")
    on = engine.generate([prompt], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))[0]
    assert (on.token_ids, on.finish_reason, on.weights_version) == ((0,) * 5, "length", 1)


def test_weights_change_only_between_responses_and_only_if_they_fit() -> None:
    engine = engine_of()
    state = {n: w.clone() for n, w in engine._network.model.state_dict().items()}
    engine.add(Request("first", (1, 2, 3), SamplingParams(max_tokens=8)))
    engine.step()
    engine.add(Request("second", (1, 2, 3), SamplingParams(max_tokens=8)))
    with pytest.raises(StateError, match="1 requests have begun"):
        engine.load_weights(state, 2)
    outputs = []
    while engine.stats().started:
        outputs += engine.step(admit=False)
    assert {(o.request_id, o.weights_version) for o in outputs} == {("first", 0)}
    name = next(iter(state))
    for wrong in (
        {**state, name: state[name][:-1]},
        {**state, "more": state[name]},
        dict(list(state.items())[1:]),
    ):
        with pytest.raises(CheckpointError, match=r"missing|unknown|another shape"):
            engine.load_weights(wrong, 2)
        assert engine.weights_version == 0
    engine.load_weights(state, 2)
    assert {o.weights_version for o in run(engine)["second"]} == {2}
    engine.add(Request("third", (1,), SamplingParams(max_tokens=2)))
    with pytest.raises(StateError, match="unfinished"):
        engine.generate([[1]], SamplingParams())


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
