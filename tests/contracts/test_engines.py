"""What every registered generation engine must do, whatever it caches: `EngineProtocol`, made from its section."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from escala.contract.errors import CheckpointError, SpecError, StateError
from escala.schema import ModelConfig, MoEConfig
from escala.schema.engines import KINDS
from escala.schema.serve import ServeConfig
from workloads.data.tokenizer import TextTokenizer, train_tokenizer, wrap
from workloads.generation.engines import make_engine
from workloads.generation.protocol import EngineProtocol, Output, Request, SamplingParams
from workloads.model.transformer import Transformer

VOCAB = 300
pytestmark = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return wrap(train_tokenizer(["the cat sat on the mat and the dog ran after the cat"] * 5, VOCAB), "test")


def engine_of(
    kind: str,
    tokenizer: TextTokenizer | None = None,
    *,
    moe: dict[str, object] | None = None,
    **limits: object,
) -> tuple[EngineProtocol, dict[str, Tensor]]:
    """An engine, and a copy of its model's weights."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB, n_layers=1, d_model=32, n_heads=2, d_ff=32, max_context_tokens=64, moe=moe
    )
    model = Transformer(config)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    return make_engine(KINDS.read({"kind": kind, **limits}), model, tokenizer), state


def run(engine: EngineProtocol) -> dict[str, list[Output]]:
    """All outputs by request."""
    found: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    return found


def test_a_replica_s_section_is_read_as_it_was_written(kind: str) -> None:
    config = ServeConfig(model="/m", engine={"kind": kind, "max_running": 3})
    plain = config.model_dump(mode="json")
    assert ServeConfig(**plain) == config
    assert ("kind" in plain["engine"]) == (kind != KINDS.default)
    with pytest.raises(ValidationError, match="Extra inputs"):
        ServeConfig(model="/m", engine={"kind": kind, "wings": 2})


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", (), SamplingParams()), "prompt is empty"),
        (Request("a", (1, VOCAB), SamplingParams()), "not of the vocabulary"),
        (Request("a", (1, -1), SamplingParams()), "not of the vocabulary"),
        (Request("a", (1,), SamplingParams(stop_token_ids=(VOCAB,))), "not of the vocabulary"),
        (Request("a", (1,) * 60, SamplingParams(max_tokens=5)), "context holds 64"),
        (Request("a", (1,), SamplingParams(max_tokens=4, stop=("x",))), "no tokenizer"),
    ],
)
def test_what_can_never_run_is_refused(kind: str, request_: Request, message: str) -> None:
    engine, _ = engine_of(kind)
    with pytest.raises(SpecError, match=message):
        engine.add(request_)
    assert not engine.has_work


def test_a_response_is_the_same_alone_and_in_any_batch(kind: str) -> None:
    prompts = [tuple(range(1, n)) for n in (4, 19, 30, 9, 2)]
    params = [SamplingParams(max_tokens=9, seed=n, temperature=n % 2) for n in range(5)]
    together = engine_of(kind)[0].generate(prompts, params)
    alone = [engine_of(kind)[0].generate([p], q)[0] for p, q in zip(prompts, params, strict=True)]
    assert alone == together == engine_of(kind, max_running=2)[0].generate(prompts, params)


def test_cancelled_requests_are_reported_once_and_give_their_blocks_back(kind: str) -> None:
    engine, _ = engine_of(kind, max_running=1)
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


def test_a_stream_put_together_is_the_whole_response(kind: str, tokenizer: TextTokenizer) -> None:
    engine, _ = engine_of(kind, tokenizer)
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


def test_stop_tokens_stop_strings_and_end_of_text(kind: str, tokenizer: TextTokenizer) -> None:
    engine, state = engine_of(kind, tokenizer)
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
    weights = {n: torch.zeros_like(w) for n, w in state.items()}
    engine.load_weights(
        weights, 1
    )  # a model that can only end: all logits 0: greedy takes token 0, the end of text
    assert tokenizer.end_of_text == 0
    ended = engine.generate([prompt], SamplingParams(max_tokens=5, temperature=0))[0]
    assert (ended.token_ids, ended.text, ended.finish_reason) == ((0,), "", "stop")
    on = engine.generate([prompt], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))[0]
    assert (on.token_ids, on.finish_reason, on.weights_version) == ((0,) * 5, "length", 1)


def test_weights_change_only_between_responses_and_only_if_they_fit(kind: str) -> None:
    engine, state = engine_of(kind)
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


@pytest.mark.parametrize("own", [None, 0.5])
def test_a_mixture_s_capacity_factor_changes_between_responses_alone(kind: str, own: float | None) -> None:
    moe = {"experts": 4, "chosen": 2, "evaluation_capacity_factor": own}
    engine, _ = engine_of(kind, moe=moe)
    assert (engine.capacity_factor, engine.weights_version) == (own, 0)
    prompts, params = [[1, 2, 3, 4, 5, 6, 7, 8], [9] * 20], SamplingParams(max_tokens=8)
    first = engine.generate(prompts, params)
    engine.set_capacity_factor(0.7, 3)
    other = engine.generate(prompts, params)
    assert (engine.capacity_factor, {one.weights_version for one in other}) == (0.7, {3})
    assert [one.logprobs for one in other] != [one.logprobs for one in first]
    engine.add(Request("running", (1, 2, 3), SamplingParams(max_tokens=8)))
    engine.step()
    with pytest.raises(StateError, match="1 requests have begun"):
        engine.set_capacity_factor(own, 4)
    assert (engine.capacity_factor, engine.weights_version) == (0.7, 3)
    run(engine)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        for refuse in (engine.check_capacity_factor, lambda factor: engine.set_capacity_factor(factor, 4)):
            with pytest.raises(SpecError, match="Capacity factor"):
                refuse(wrong)
    engine.set_capacity_factor(own, 4)
    assert [one.logprobs for one in engine.generate(prompts, params)] == [one.logprobs for one in first]


@pytest.mark.parametrize("own", [None, 0.5])
def test_an_engine_that_is_told_a_factor_starts_with_it(kind: str, own: float | None) -> None:
    config = ModelConfig(vocab_size=VOCAB, n_layers=1, d_model=32, n_heads=2, max_context_tokens=64)
    moe = {"experts": 4, "chosen": 2, "evaluation_capacity_factor": own}
    mixture = Transformer(config.model_copy(update={"moe": MoEConfig.model_validate(moe)}))
    assert make_engine(KINDS.read({"kind": kind}), mixture, None, capacity_factor=0.8).capacity_factor == 0.8
    with pytest.raises(SpecError, match="dense model"):
        make_engine(KINDS.read({"kind": kind}), Transformer(config), None, capacity_factor=0.8)


def test_a_dense_model_has_no_capacity_factor(kind: str) -> None:
    engine, _ = engine_of(kind)
    with pytest.raises(SpecError, match="dense model"):
        engine.set_capacity_factor(1.0, 2)
    assert (engine.capacity_factor, engine.weights_version) == (None, 0)
    engine.set_capacity_factor(None, 2)  # the same weights as another version
    assert (engine.capacity_factor, engine.weights_version) == (None, 2)
