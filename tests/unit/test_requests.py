"""Nothing of one request ends the engine, or touches another request: the service's real app, replica and engine in
one process.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from ray.serve._private import replica as serve_replica
from tokenizers import decoders, pre_tokenizers

from benchmarks import fuzz_requests
from escala.contract.errors import DataError, SpecError, StateError
from tests.unit.local_service import ask, chat_tokenizer, local_service, quiet
from workloads.generation import drawing
from workloads.generation import engine as engine_module
from workloads.generation.protocol import EngineStopped, SamplingParams
from workloads.serving import guard, retry, tokenising
from workloads.serving.loopback import keep_serve_on_loopback
from workloads.serving.parsing import parse
from workloads.serving.policy import Policy
from workloads.serving.schemas import ChatRequest, CompletionRequest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 12, "seed": 3, "logprobs": 0, "ignore_eos": True}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def served(tokenizer: Any, test: Callable[[Policy], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run `test` on a service; the engine must live afterwards, and hold nothing."""

    async def main() -> None:
        async with local_service(tokenizer, **options) as policy:
            await asyncio.wait_for(test(policy), 40)
            policy.stepper.check()
            await quiet(policy)

    asyncio.run(main())


async def beside(bad: Coroutine[Any, Any, Any]) -> Any:
    """What `bad` gives, while a good request runs beside it and gets what it gets alone; the next one is served."""
    alone = (await ask(COMPLETIONS, GOOD)).json()["choices"]
    good = asyncio.create_task(ask(COMPLETIONS, GOOD))
    await asyncio.sleep(0)
    found = await bad
    assert (await good).json()["choices"] == alone
    assert (await ask(COMPLETIONS, {**GOOD, "max_tokens": 2})).status == 200
    return found


def test_fuzzed_requests_get_answers_of_their_own_and_leak_nothing(tmp_path: Path) -> None:
    found = asyncio.run(fuzz_requests.fuzz(tmp_path, 200, seed=1))
    assert found.wrong == []
    assert found.neighbours >= 3
    assert found.statuses[200] > 30
    assert found.statuses[400] > 30


def test_clients_that_leave_at_random_moments_end_only_their_own_streams(tmp_path: Path) -> None:
    stayed, left = asyncio.run(fuzz_requests.cancellations(tmp_path, 2, seed=0, tokens=10))
    assert stayed + left == 2 * fuzz_requests.STREAMS
    assert min(stayed, left) > 20


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 1e-40},
        {"temperature": 1.18e-38, "repetition_penalty": 1.18e-38},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e39},
        {"temperature": 1e39},
        {"temperature": 10**400},
        {"top_p": -1e-300},
        {"top_p": 1.0000001},
        {"min_p": 1},
        {"top_k": 2**63},
        {"top_k": -2},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
        {"seed": 10**4000},
        {"max_tokens": 2**70},
        {"temperature": True},
        {"stop_token_ids": [2**64]},
        {"stop_token_ids": [True]},
        {"stop": ["x"] * 65},
        {"stop": "x" * 1025},
        {"stop": [""]},
        {"prompt": [[1], "a"]},
        {"prompt": [1.0]},
        {"prompt": []},
        {"prompt": [2**63]},
        {"prompt": [[1]] * 200, "n": 100},
        {"logprobs": True},
        {"metadata": {}, "unheard_of": 1},
    ],
)
def test_what_cannot_be_computed_is_that_request_s_error(tokenizer: Any, bad: dict[str, Any]) -> None:
    async def test(policy: Policy) -> None:
        answer = await beside(ask(COMPLETIONS, {**GOOD, **bad}))
        assert (answer.status, answer.json()["error"]["type"]) == (400, "SpecError")

    served(tokenizer, test)


@pytest.mark.parametrize(
    "fine",
    [
        {"temperature": 1e-30},
        {"temperature": 3.4e38},
        {"top_p": 5e-324},
        {"min_p": 1e-320},
        {"repetition_penalty": 3e38},
        {"top_k": 2**63 - 1},
        {"seed": 2**63 - 1, "n": 3},
        {"seed": -1, "n": 2},
        {"temperature": 0, "repetition_penalty": 1e30},
    ],
)
def test_numbers_at_the_limits_are_served(tokenizer: Any, fine: dict[str, Any]) -> None:
    async def test(policy: Policy) -> None:
        answer = await beside(ask(COMPLETIONS, {**GOOD, **fine}))
        assert answer.status == 200, answer.text
        assert all(len(c["logprobs"]["tokens"]) == 12 for c in answer.json()["choices"])

    served(tokenizer, test)


NOTHINGS: dict[str, list[Any]] = {
    "logit_bias": [{}],
    "presence_penalty": [0.0, 0],
    "frequency_penalty": [0.0],
    "best_of": [1],
    "suffix": [""],
    "echo": [False],
    "stop": [[], ""],
    "user": ["me"],
    "metadata": [{}, {"a": "b"}],
    "store": [False],
    "service_tier": ["auto"],
    "top_k": [-1, 0],
    "stream_options": [{}, {"include_usage": False}],
    "logprobs": [False],
}
CHAT_NOTHINGS: dict[str, list[Any]] = {
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "top_logprobs": [0],
    "modalities": [["text"]],
    "max_completion_tokens": [],
    "chat_template_kwargs": [{}],
}
FIELDS = ("n", "temperature", "top_p", "seed", "stream", "max_tokens", "model", "min_version", "ignore_eos")


def test_values_that_ask_for_nothing_are_taken() -> None:
    whole = {"prompt": "a", **dict.fromkeys((*NOTHINGS, *FIELDS))}
    assert parse(CompletionRequest, json.dumps(whole).encode()) == parse(
        CompletionRequest, b'{"prompt": "a"}'
    )
    plain = parse(ChatRequest, json.dumps({"messages": HELLO}).encode())
    for name, values in (NOTHINGS | CHAT_NOTHINGS).items():
        for value in (None, *values):
            asked = parse(ChatRequest, json.dumps({"messages": HELLO, name: value}).encode())
            assert asked == plain, (name, value)
    for name, values in NOTHINGS.items():
        for value in (None, *values):
            asked = parse(CompletionRequest, json.dumps({"prompt": "a", name: value}).encode())
            assert asked.sampling(1)[0].stop == (), (name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 10}),
        ("presence_penalty", 1e-9),
        ("presence_penalty", False),
        ("top_logprobs", 3),
        ("store", True),
        ("store", 0),
        ("best_of", 2),
    ],
)
def test_values_that_ask_for_something_else_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=name):
        parse(ChatRequest, json.dumps({"messages": HELLO, name: value}).encode())


@pytest.mark.parametrize("error", [RuntimeError("Invalid prefix"), BaseException("a panic"), SystemExit(1)])
@pytest.mark.parametrize("where", ["push", "finish"])
def test_an_error_of_one_response_s_text_ends_that_response(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    original = getattr(engine_module.TextStream, where)

    def broken(self: Any, *given: Any) -> str:
        if "break" in self._stop:
            raise error
        return str(original(self, *given))

    monkeypatch.setattr(engine_module.TextStream, where, broken)

    async def test(policy: Policy) -> None:
        bad = {**GOOD, "stop": "break", "max_tokens": 5}
        answer = await beside(ask(COMPLETIONS, bad))
        assert (answer.status, answer.json()["error"]["type"]) == (500, "RequestFailed")
        streamed = await beside(ask(COMPLETIONS, {**bad, "stream": True}))
        last = streamed.json() if streamed.status == 500 else streamed.events()[-1]
        assert last["error"]["type"] == "RequestFailed"
        task = asyncio.create_task(ask(COMPLETIONS, bad))
        await asyncio.sleep(0.001)
        task.cancel()  # the engine asks for the text that was held back

    served(tokenizer, test)


def test_a_batch_that_is_not_drawn_is_drawn_row_by_row(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = drawing.sample

    def broken(logits: Any, draws: Any) -> Any:
        if any(draw.params.seed == 666 for draw in draws):
            raise RuntimeError("no such kernel")
        return original(logits, draws)

    monkeypatch.setattr(drawing, "sample", broken)

    async def test(policy: Policy) -> None:
        answer = await beside(ask(COMPLETIONS, {**GOOD, "seed": 666}))
        assert (answer.status, answer.json()["error"]["type"]) == (500, "RequestFailed")

    served(tokenizer, test)


def test_a_template_s_own_error_is_that_request_s(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = type(tokenizer).prompt

    def broken(self: Any, prompt: Any) -> Any:
        if prompt == HELLO:
            raise ZeroDivisionError("in a template")
        return original(self, prompt)

    monkeypatch.setattr(type(tokenizer), "prompt", broken)

    async def test(policy: Policy) -> None:
        answer = await beside(ask(CHAT, {"messages": HELLO}))
        assert (answer.status, answer.json()["error"]["type"]) == (500, "RequestFailed")

    served(tokenizer, test)


def test_panics_of_the_tokenizers_library_end_their_own_requests(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    plain = tokenizer._plain

    async def test(policy: Policy) -> None:
        tokenizer.tokenizer.decoder = decoders.Strip("Ġ", 0, 9)  # reads before a token's first letter
        blank = tokenizer.tokenizer.token_to_id("Ġ")
        bad = {**GOOD, "top_k": 1, "prompt": [blank], "stop": "x"}
        with pytest.raises(BaseException, match="index out of bounds") as found:
            tokenizer.tokenizer.decode([blank])
        assert not isinstance(found.value, Exception)
        policy.stepper.engine._ends = frozenset()  # type: ignore[attr-defined]
        draws = iter([blank])
        original = drawing.sample

        def sample(logits: Any, given: Any) -> Any:
            tokens, logprobs = original(logits, given)
            return [
                next(draws, t) if d.params.top_k == 1 else t for t, d in zip(tokens, given, strict=True)
            ], logprobs

        with mock.patch.object(drawing, "sample", sample):
            answer = await ask(COMPLETIONS, bad)
        assert (answer.status, answer.json()["error"]["type"]) == (500, "RequestFailed")
        assert "PanicException" in answer.text
        plain.pre_tokenizer = pre_tokenizers.FixedLength(0)
        answer = await ask(COMPLETIONS, {**GOOD, "prompt": "hello"})
        assert (answer.status, "PanicException" in answer.text) == (400, True)
        tokenizer.tokenizer.decoder = decoders.ByteLevel()
        assert (await ask(COMPLETIONS, GOOD)).status == 200

    served(tokenizer, test)


def test_when_an_engine_dies_clients_are_told_and_its_replica_is_unhealthy(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PAUSE_SECONDS", (0.0,) * 3)

    async def main() -> None:
        async with local_service(tokenizer) as policy:
            await policy.check_health()
            streaming = asyncio.create_task(ask(COMPLETIONS, {**GOOD, "max_tokens": 200, "stream": True}))
            while policy.stepper.stats.generated_tokens < 3:
                await asyncio.sleep(0.001)

            def broken(admit: bool = True) -> list[Any]:
                raise RuntimeError("no such kernel")

            policy.stepper.engine.step = broken  # type: ignore[method-assign]
            events = (await streaming).events()
            assert events[0]["choices"]
            assert events[-1]["error"]["type"] == "EngineStopped"
            answer = await ask(COMPLETIONS, GOOD)
            assert (answer.status, answer.json()["error"]["type"]) == (503, "EngineStopped")
            assert "no such kernel" in answer.json()["error"]["message"]
            with pytest.raises(StateError, match="no such kernel"):
                await policy.check_health()

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_the_service_asks_another_replica_where_an_engine_has_died(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(retry, "PAUSE_SECONDS", (0.0,) * 3)
    asked: list[str] = []

    def wrap(policy: Policy) -> Any:
        def dead() -> bool:
            asked.append("")
            return len(asked) < 3

        async def complete(*given: Any, **named: Any) -> Any:
            if dead():
                raise EngineStopped("The engine has stopped.", "")
            return await policy.complete(*given, **named)

        async def pieces(*given: Any, **named: Any) -> Any:
            if dead():
                raise EngineStopped("The engine has stopped.", "")
            async for piece in policy.stream(*given, **named):
                yield piece

        return SimpleNamespace(complete=complete, stream=pieces)

    async def test(policy: Policy) -> None:
        answer = await ask(COMPLETIONS, {**GOOD, "stream": stream})
        assert (answer.status, len(asked)) == (200, 3)
        assert not stream or answer.events()[-1] == "[DONE]"

    served(tokenizer, test, wrap=wrap)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"body": b" " * (guard.BODY_BYTES + 1)}, 413),
        ({"chunks": [b" " * (1 << 20)] * 17}, 413),
        ({"body": b"{}", "content_length": str(guard.BODY_BYTES + 1)}, 413),
        ({"body": b"{}", "content_length": "9" * 5000}, 413),
        ({"chunks": [b" " * (1 << 20)] * 17, "content_length": "2"}, 413),
        ({"body": b"{}", "content_type": "text/plain"}, 415),
        ({"body": b"{}", "content_type": ""}, 415),
        ({"body": b"{}", "content_type": "application/x-www-form-urlencoded"}, 415),
        ({"body": b"{}", "content_encoding": "gzip"}, 415),
        ({"body": GOOD, "content_type": "Application/JSON; charset=utf-8"}, 200),
        ({"body": GOOD, "origin": "http://evil.example"}, 403),
        ({"body": GOOD, "origin": "null"}, 403),
        ({"body": GOOD, "origin": "http://127.0.0.1:9000"}, 403),
        ({"body": GOOD, "origin": "http://127.0.0.1:8199.evil.example"}, 403),
        ({"body": GOOD, "origin": "http://[::bad"}, 403),
        ({"body": GOOD, "origin": "http://127.0.0.1:8199"}, 200),
        ({"body": GOOD, "sec_fetch_site": "cross-site"}, 403),
        ({"body": GOOD, "sec_fetch_site": "same-origin", "origin": "http://127.0.0.1:8199"}, 200),
        ({"body": GOOD, "host": "evil.example"}, 401),
        ({"body": b"[" * 100_000}, 400),
        ({"body": b'{"a":' * 1000 + b"1" + b"}" * 1000}, 400),
        ({"body": b'{"a": [' + b"[]," * 1_100_000 + b"[]]}"}, 400),
        ({"body": b'{"prompt": [' + b"1," * 1_100_000 + b"1]}"}, 400),
        ({"body": json.dumps({str(i): 1 for i in range(300)}).encode()}, 400),
        ({"body": b'{"prompt": "\\ud800"}'}, 400),
        ({"body": b"\xff\xfe"}, 400),
        ({"body": b"null"}, 400),
        ({"body": b""}, 400),
    ],
)
def test_who_may_ask_and_what_is_read(tokenizer: Any, given: dict[str, Any], status: int) -> None:
    async def test(policy: Policy) -> None:
        answer = await ask(COMPLETIONS, given.pop("body", None), **given)
        assert answer.status == status, answer.text
        assert status == 200 or answer.json()["error"]["message"]

    served(tokenizer, test)


def test_a_body_that_does_not_come_and_a_client_that_is_gone(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.02)

    async def test(policy: Policy) -> None:
        never = asyncio.Event()

        async def stream() -> Any:
            yield b"{"
            await never.wait()

        asked = SimpleNamespace(headers={"content-type": "application/json"}, stream=stream)
        with pytest.raises(guard.TooSlow):
            await guard.read_body(asked)  # type: ignore[arg-type]
        assert (await ask(COMPLETIONS, chunks=[], leave=True)).status == guard.CLIENT_GONE

    served(tokenizer, test)


@pytest.mark.parametrize("path", ["/", "/v1/nothing", "/v1/completions/", "/redoc"])
def test_unknown_paths_get_an_error_object(tokenizer: Any, path: str) -> None:
    async def test(policy: Policy) -> None:
        answer = await ask(path)
        assert answer.status in (404, 307, 405)
        assert answer.status == 307 or answer.json()["error"]["message"]

    served(tokenizer, test)


def test_beside_prompts_of_ten_megabytes_others_are_answered(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the cat " * 1_250_000
    working, go_on = asyncio.Event(), []
    original = type(tokenizer).prompt

    async def test(policy: Policy) -> None:
        refused = await ask(COMPLETIONS, {"prompt": text})
        assert (refused.status, "10000000 characters" in refused.text) == (400, True)
        policy.prompts.most_characters = 1 << 30  # a model of a longer context: the prompt is read
        loop = asyncio.get_running_loop()

        def slow(self: Any, prompt: Any) -> Any:
            if len(prompt) > 1000:
                loop.call_soon_threadsafe(working.set)
                while not go_on:  # for as long as the test likes
                    time.sleep(0.001)
            return original(self, "the cat")

        monkeypatch.setattr(type(tokenizer), "prompt", slow)
        long = [asyncio.create_task(ask(COMPLETIONS, {**GOOD, "prompt": text})) for _ in range(3)]
        await working.wait()
        for _ in range(5):  # none of the long prompts has been read yet
            answers = await asyncio.gather(
                ask(COMPLETIONS, {"prompt": "the dog"}), ask(CHAT, {"messages": HELLO, "max_tokens": 3})
            )
            assert [a.status for a in answers] == [200, 200]
        go_on.append(True)
        assert [(await task).status for task in long] == [200] * 3

    served(tokenizer, test)


def test_while_a_long_prompt_is_tokenised_others_are_answered(tokenizer: Any) -> None:
    """The tokenizer itself at work: in a thread that held the interpreter's lock meanwhile, nobody would be."""
    text = "the cat sat on the dog, and " * 10_000  # half a second or more

    async def test(policy: Policy) -> None:
        policy.prompts.most_characters = 1 << 30
        for path, body in (
            (COMPLETIONS, {"prompt": text}),
            (CHAT, {"messages": [{"role": "user", "content": text}]}),
        ):
            long, answered = asyncio.create_task(ask(path, body)), 0
            while not long.done():
                answered += (await ask(COMPLETIONS, {"prompt": "the dog", "max_tokens": 2})).status == 200
            assert (await long).status == 400  # tokenised, and longer than the context
            assert answered >= 5

    served(tokenizer, test)


def test_prompts_longer_than_the_context_are_not_read(tokenizer: Any) -> None:
    class Unread:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

    prompts = tokenising.Tokenising(tokenizer, 256)
    prompts.tokenizer = Unread()  # type: ignore[assignment]
    for prompt in ("a" * (prompts.most_characters + 1), [5] * 257, HELLO * 257):
        with pytest.raises(SpecError, match="than the context"):
            asyncio.run(prompts.tokens(prompt))  # type: ignore[arg-type]
    prompts.close()


def test_serve_s_own_ports_are_opened_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    assert callable(serve_replica.add_port_to_grpc_server)
    monkeypatch.setattr(
        serve_replica, "add_port_to_grpc_server", lambda server, address: opened.append(address) or 7
    )
    keep_serve_on_loopback()
    keep_serve_on_loopback()
    assert serve_replica.add_port_to_grpc_server(None, "[::]:0") == 7
    assert opened == ["127.0.0.1:0"]


@pytest.mark.parametrize("value", [1e39, -1e300, float("nan"), float("inf")])
def test_a_score_that_is_not_finite_in_fp32_is_refused(value: float) -> None:
    from workloads.rewards.function import FunctionReward
    from workloads.rewards.scoring import weighted_sums

    with pytest.raises(SpecError, match="response 2"):
        FunctionReward("tests.reward_functions:said").score(["a", "b"], ["0.5", str(value)])
    with pytest.raises(DataError, match="response 2"):
        weighted_sums([(1.0, [0.5, value]), (2.0, [1.0, 1.0])])
    with pytest.raises(DataError, match="response 1"):
        weighted_sums([(1e30, [3e38])])


def test_a_response_of_ppo_that_failed_is_drawn_again_and_the_others_are_not() -> None:
    from workloads.alignment.rollouts import ask as ask_for
    from workloads.generation.protocol import RequestFailed

    class Service:
        def generate(self, prompts: Any, params: Any, min_version: int = 0) -> list[Any]:
            if any(p.seed == 5 for p in params):
                raise RequestFailed("a decoder panicked", "")
            return [(tuple(prompt), p.seed) for prompt, p in zip(prompts, params, strict=True)]

        def score(self, prompts: Any, responses: Any) -> list[float]:
            return []

    params = [SamplingParams(seed=seed) for seed in range(9)]
    found = ask_for(Service(), [[i] for i in range(9)], params, 1)
    assert [seed for _, seed in found] == [0, 1, 2, 3, 4, 5 ^ (1 << 62), 6, 7, 8]
    assert [prompt for prompt, _ in found] == [(i,) for i in range(9)]


def test_loads_that_are_cancelled_hold_nothing_up(tokenizer: Any) -> None:
    async def test(policy: Policy) -> None:
        rng, stepper = random.Random(0), policy.stepper
        state = {n: w.clone() for n, w in stepper.engine._network.model.state_dict().items()}  # type: ignore[attr-defined]
        alone = (await ask(COMPLETIONS, GOOD)).json()["choices"]
        for version in range(1, 13):
            good = asyncio.create_task(stepper.complete([5, 6, 7], SamplingParams(max_tokens=30, seed=3)))
            load = asyncio.create_task(stepper.load(state, version))
            await asyncio.sleep(rng.choice((0, 0, 0.002, 0.02)))
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
            assert len((await good).token_ids) == 30
        policy._versions = dict.fromkeys(range(13), policy.receiver.current)
        await stepper.load(state, 99)
        policy._versions[99] = policy.receiver.current
        assert (await ask(COMPLETIONS, GOOD)).json()["choices"] == alone

    served(tokenizer, test)


def test_a_dead_replica_s_place_is_its_successor_s(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.util

    from workloads.serving import places as places_module

    made: list[Any] = []
    removed: list[Any] = []
    alive = {"a", "b"}

    def group(bundles: list[dict[str, float]]) -> Any:
        made.append(SimpleNamespace(bundles=bundles, wait=lambda seconds: True))
        return made[-1]

    monkeypatch.setattr(ray.util, "placement_group", group)
    monkeypatch.setattr(ray.util, "remove_placement_group", removed.append)
    monkeypatch.setattr(places_module, "actor_of", lambda name: name if name in alive else None)
    monkeypatch.setattr(places_module, "TIDY_SECONDS", 0.01)

    async def main() -> None:
        places = places_module.Places(2.0)
        await asyncio.gather(places.take("a"), places.take("a"), places.take("b"))
        assert [g.bundles for g in made] == [[{"CPU": 2.0}]] * 2
        alive.symmetric_difference_update({"a", "c", "d"})  # a was killed
        await asyncio.gather(places.take("c"), places.take("d"))
        assert (len(made), removed) == (3, [])  # one of them has a's, which nobody else could have taken
        await places.leave("b")
        await places.leave("b")
        assert removed == [made[1]]
        alive.discard("c")  # nobody comes after it
        async with asyncio.timeout(20):
            while len(removed) < 2:
                await asyncio.sleep(0.001)
        assert set(places._groups) == {"d"}

    asyncio.run(main())
