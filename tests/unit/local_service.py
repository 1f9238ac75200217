"""The rollout service in this process: the real HTTP app, replica, tokenizer and engine, Ray and Serve left out.

What goes between the deployments is pickled, and errors come as Ray brings them.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from ray import serve
from ray.exceptions import RayTaskError

from escala.rollouts.weights import digest_of
from escala.schema import ModelConfig
from escala.schema.serve import ServeConfig
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.tokenizer import train_tokenizer
from workloads.generation.engine import Engine
from workloads.model.transformer import Transformer
from workloads.serving import api
from workloads.serving.engine_loading import initial_version
from workloads.serving.latency import Latencies
from workloads.serving.policy import Policy
from workloads.serving.records import Generated
from workloads.serving.stepper import Stepper
from workloads.serving.tokenising import Tokenising
from workloads.serving.weights import pack

VOCAB = 320
TEXTS = ["the cat sat on the mat and the dog ran after the cat", "é ü 日本 😀 done"] * 5


def model(seed: int = 0, context: int = 256) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=VOCAB, n_layers=1, d_model=32, n_heads=2, d_ff=32, max_context_tokens=context
    )
    made = Transformer(config).eval()
    with torch.no_grad():  # logits of some tens, as trained models have
        for name, weight in made.named_parameters():
            if "head" in name or "embed" in name:
                weight.mul_(30)
    return made


def chat_tokenizer(directory: Path) -> Any:
    path = directory / "tokenizer.json"
    train_tokenizer(TEXTS, VOCAB).save(str(path))
    return load_chat_tokenizer(path)


class LocalPolicy(Policy):
    """Closed by `local_service`."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


class LocalApi(api.Api):
    """Closed by nobody: it holds nothing."""

    def __del__(self) -> None:
        pass


class Receiver:
    """Weights that never change."""

    failure = None

    def __init__(self, weights: Any) -> None:
        self.current = weights

    async def require(self, min_version: int = 0, max_staleness: int | None = None) -> Any:
        return self.current


def local_policy(tokenizer: Any, **engine: Any) -> Policy:
    """A replica, without Serve. Call it inside the event loop."""
    policy = LocalPolicy.__new__(LocalPolicy)
    policy.config = ServeConfig(model="m", engine={"max_response_tokens": 200})
    made = model()
    digest = digest_of(pack(made.state_dict()))
    policy.tokenizer = tokenizer
    policy.stepper = Stepper(Engine(made, tokenizer, **{"max_running": 8, "block_tokens": 8, **engine}))
    weights = initial_version(digest, "fp32", policy.stepper.engine)
    policy.prompts = Tokenising(tokenizer, policy.stepper.engine.max_context_tokens)
    policy.replica = SimpleNamespace(latencies=Latencies(5.0))  # type: ignore[assignment]
    policy._versions = {0: weights}
    policy.receiver = Receiver(weights)  # type: ignore[assignment]
    return policy


class Handle:
    """What a deployment's handle does, on an object of this process."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def options(self, stream: bool) -> Handle:
        return self

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.target, name)

        def remote(*arguments: Any, **named: Any) -> Any:
            given, more = pickle.loads(pickle.dumps((arguments, named)))
            answer = method(*given, **more)
            return _pieces(answer) if name == "stream" else _result(answer)

        return SimpleNamespace(remote=remote)


def _as_ray_brings_it(error: Exception) -> RayTaskError:
    cause = pickle.loads(pickle.dumps(error))
    return RayTaskError("method", "the traceback", cause).as_instanceof_cause()


async def _result(call: Awaitable[Any]) -> Any:
    try:
        return pickle.loads(pickle.dumps(await call))
    except Exception as error:  # noqa: BLE001  as Ray does
        raise _as_ray_brings_it(error) from None


async def _pieces(stream: Any) -> AsyncIterator[Any]:
    try:
        async for piece in stream:
            yield pickle.loads(pickle.dumps(piece))
    except Exception as error:  # noqa: BLE001  as Ray does
        raise _as_ray_brings_it(error) from None
    finally:
        await stream.aclose()


@dataclass
class Answer:
    """What a client got."""

    status: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    def events(self) -> list[Any]:
        """Of a stream; the last one is "[DONE]" where it came to its end."""
        data = [line.removeprefix("data: ") for line in self.text.split("\n\n") if line]
        return [each if each == "[DONE]" else json.loads(each) for each in data]


async def ask(
    path: str, body: Any = None, *, chunks: Sequence[bytes] | None = None, leave: bool = False, **headers: str
) -> Answer:
    """One HTTP request to the app, from this machine.

    Args:
        body: JSON, or bytes as they are; None: a GET.
        chunks: the body in pieces, without a length.
        leave: the client is gone after the last piece.
    """
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    pieces = list(chunks) if chunks is not None else [raw]
    given = {"host": "127.0.0.1:8199", "content-type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET" if body is None and chunks is None else "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1234),
        "server": ("127.0.0.1", 8199),
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        if not leave:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await api.app(scope, receive, send)  # type: ignore[arg-type]
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]} if sent else {}
    text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    return Answer(sent[0]["status"] if sent else 0, found, text)


@asynccontextmanager
async def local_service(
    tokenizer: Any, *, wrap: Callable[[Any], Any] = lambda policy: policy, reward: Any = None, **engine: Any
) -> AsyncIterator[Policy]:
    """The service that `ask` reaches, and its replica. `wrap` stands between the replica and its handle."""
    policy = local_policy(tokenizer, **engine)
    served = LocalApi.__new__(LocalApi)
    served.config = ServeConfig(model="m")
    served._policy, served._judge = Handle(wrap(policy)), None
    served._reward = None if reward is None else Handle(reward)
    context = SimpleNamespace(servable_object=served)
    with mock.patch.object(serve, "get_replica_context", return_value=context):
        yield policy
    await policy.stepper.close()
    policy.prompts.close()


async def quiet(policy: Policy) -> None:
    """Until the engine has noticed that everybody has left. It must hold nothing then."""
    async with asyncio.timeout(20):
        while policy.stepper.engine.has_work or not policy.stepper._commands.empty():
            await asyncio.sleep(0.01)
    stats = policy.stepper.engine.stats()
    held = (stats.running, stats.waiting, stats.started, stats.queued_tokens, len(policy.stepper._waiting))
    assert held == (0, 0, 0, 0, 0), stats
    assert stats.free_blocks == stats.total_blocks


def tokens_of(generated: Generated) -> tuple[int, ...]:
    return generated.completion.token_ids
