"""What /openapi.json says of the rollout service's routes: complete, true of the answers, and guarded as they are."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from ray import serve

from tests.unit.local_service import Answer, ask, chat_tokenizer, local_service
from workloads.serving import schemas

HELLO = [{"role": "user", "content": "hello"}]
WRITTEN: dict[str, Any] = {"max_tokens": 5, "seed": 3, "ignore_eos": True}
ROUTES = {
    ("get", "/v1/models"),
    ("post", "/v1/completions"),
    ("post", "/v1/chat/completions"),
    ("post", "/score"),
    ("post", "/compare"),
    ("get", "/weights"),
    ("get", "/service"),
}


class Scorer:
    """Of the `reward` deployment."""

    async def score(self, prompts: list[Any], responses: list[str]) -> list[float]:
        return [0.5] * len(responses)


def answers(directory: Path, asked: list[tuple[str, Any, dict[str, str]]]) -> list[Answer]:
    async def main() -> list[Answer]:
        async with local_service(chat_tokenizer(directory), reward=Scorer()):
            return [await ask(path, body, **headers) for path, body, headers in asked]

    return asyncio.run(main())


def resolved(document: Any, part: Any) -> Any:
    """A part of a document with what it refers to."""
    while isinstance(part, dict) and "$ref" in part:
        name = part["$ref"].removeprefix("#/components/schemas/")
        part = document["components"]["schemas"][name]
    return part


def test_every_route_is_documented_with_its_models_and_errors(tmp_path: Path) -> None:
    (answer,) = answers(tmp_path, [("/openapi.json", None, {})])
    document = answer.json()
    found = {
        (method, path): each for path, item in document["paths"].items() for method, each in item.items()
    }
    assert found.keys() == ROUTES
    for (method, path), route in found.items():
        assert route["description"], path
        success = resolved(document, route["responses"]["200"]["content"]["application/json"]["schema"])
        assert success["properties"], path
        refused = {"401", "403", "500", "503"} | ({"400", "413", "415"} if method == "post" else set())
        assert refused <= route["responses"].keys()
        for status, response in route["responses"].items():
            if status != "200":
                shape = response["content"]["application/json"]["schema"]
                assert resolved(document, shape)["title"] == "ErrorBody", (path, status)
        if method == "post":
            body = resolved(document, route["requestBody"]["content"]["application/json"]["schema"])
            assert body["additionalProperties"] is False
    for path in ("/v1/completions", "/v1/chat/completions"):
        events = found["post", path]["responses"]["200"]["content"]["text/event-stream"]["schema"]
        assert "choices" in resolved(document, events)["properties"]
    text = json.dumps(document)
    names = {each.split('"')[0] for each in text.split("#/components/schemas/")[1:]}
    assert names <= document["components"]["schemas"].keys()  # nothing refers to what is not there


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
def test_the_documents_are_for_those_who_may_ask(tmp_path: Path, path: str) -> None:
    elsewhere, page = {"host": "evil.example"}, {"origin": "http://evil.example"}
    found = answers(tmp_path, [(path, None, {}), (path, None, elsewhere), (path, None, page)])
    assert [answer.status for answer in found] == [200, 401, 403]

    async def with_a_token() -> list[int]:
        async with local_service(chat_tokenizer(tmp_path)):
            served = serve.get_replica_context().servable_object
            token = hashlib.sha256(b"a-long-enough-token").hexdigest()
            served.config = served.config.model_copy(update={"token_sha256": token})
            bearer = {"authorization": "Bearer a-long-enough-token"}
            return [(await ask(path)).status, (await ask(path, **bearer)).status]

    assert asyncio.run(with_a_token()) == [401, 200]


def test_answers_are_what_the_documents_and_openai_s_client_say(tmp_path: Path) -> None:
    from openai.types import Completion  # here: 1 s, of every worker that collects
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    completion = {"prompt": "the cat", "logprobs": 0, **WRITTEN}
    chat = {"messages": HELLO, "logprobs": True, **WRITTEN}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    found = answers(
        tmp_path,
        [
            ("/v1/models", None, {}),
            ("/v1/completions", {**completion, "n": 2}, {}),
            ("/v1/chat/completions", {**chat, "n": 2}, {}),
            ("/score", {"prompts": ["p"], "responses": ["r"]}, {}),
            ("/compare", {"prompts": ["p"], "first": ["a"], "second": ["b"]}, {}),
            ("/v1/completions", {**completion, **streamed}, {}),
            ("/v1/chat/completions", {**chat, **streamed}, {}),
        ],
    )
    models, whole, message, scores, no_judge, *streams = found
    for answer, kind in (
        (models, schemas.ModelList),
        (whole, schemas.CompletionBody),
        (message, schemas.ChatCompletionBody),
        (scores, schemas.ScoresBody),
        (no_judge, schemas.ErrorBody),
    ):
        exact(kind, answer.json())
    Completion.model_validate(whole.json())
    ChatCompletion.model_validate(message.json())
    for stream, kind in zip(streams, (schemas.CompletionChunk, schemas.ChatCompletionChunk), strict=True):
        *events, end = stream.events()
        assert end == "[DONE]"
        assert len(events) > 2
        for event in events:
            exact(kind, event)
    for event in streams[1].events()[:-1]:
        ChatCompletionChunk.model_validate(event)


def exact(kind: Any, answer: Any) -> None:
    """`answer` has the fields of `kind`, all of them and no other, in its order."""
    assert json.dumps(TypeAdapter(kind).validate_python(answer, extra="forbid")) == json.dumps(answer)
