"""The `api` deployment: OpenAI's HTTP interface, /score and /compare, and the same by a Python handle.

It holds no model, so that requests have somewhere to wait while `policy` has no replica. A request whose replica dies
is asked again on another one, unless its client has seen a part of the answer. Without a token only this machine is
answered.

What the class uses stands above it or in another module, and annotations are no strings (no `annotations` from the
future): Serve pickles the class by value while this module is being imported, with the names that its code uses.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from escala.contract.errors import NotFoundError, SpecError
from escala.rollouts import board
from escala.schema.serve import ServeConfig
from workloads.generation.protocol import SamplingParams
from workloads.serving.guard import answer_json, describe
from workloads.serving.loopback import keep_serve_on_loopback
from workloads.serving.openai import Format, format_of, server_sent
from workloads.serving.owner import end_with_owner
from workloads.serving.parsing import CHOICES
from workloads.serving.records import Generated, GeneratedChunk, RequestPrompt
from workloads.serving.retry import ATTEMPTS, again_or_raise, all_of, retry
from workloads.serving.routes import DOCS, OPENAPI, docs_page, document, errors, new_app, or_stream
from workloads.serving.schemas import (
    ChatCompletionBody,
    ChatRequest,
    CompareRequest,
    CompletionBody,
    CompletionRequest,
    ModelList,
    ScoreRequest,
    ScoresBody,
    ServedModel,
    ServiceStatus,
    VerdictsBody,
    WeightsStatus,
)

CHAT_TOKENS = 1 << 20  # clipped to what the service and the context leave
VERSION_HEADER = "x-escala-weights-version"
app = new_app()


def _there(handle: Any, name: str) -> Any:
    if handle is None:
        raise NotFoundError(
            f"This application has no {name}.", f"Add a `{name}` section to its configuration."
        )
    return handle


async def _events(
    written: Format, first: GeneratedChunk, rest: AsyncGenerator[GeneratedChunk], usage: bool
) -> AsyncIterator[str]:
    made = len(first.output.token_ids)
    try:
        async with aclosing(rest):
            yield server_sent(written.chunk(0, first, first=True))
            async for chunk in rest:
                made += len(chunk.output.token_ids)
                yield server_sent(written.chunk(0, chunk, first=False))
    except Exception as error:  # noqa: BLE001  too late for a status: the client's library raises on this event
        yield server_sent(describe(error))
        return
    if usage:
        yield server_sent(written.usage_chunk(first.prompt_tokens, made))
    yield "data: [DONE]\n\n"


@serve.ingress(app)
class Api:
    """The ingress. `reward` and `judge` are None where the application has none."""

    def __init__(self, config: dict[str, Any], policy: Any, reward: Any = None, judge: Any = None) -> None:
        keep_serve_on_loopback()
        self.config = ServeConfig.model_validate(config)
        self._policy, self._reward, self._judge = policy, reward, judge

    async def generate(
        self,
        prompts: Sequence[RequestPrompt],
        params: SamplingParams | Sequence[SamplingParams],
        min_version: int = 0,
        max_staleness: int | None = None,
    ) -> list[Generated]:
        """A response to each prompt, in order. One `params` for all, or one each. Raises as `Policy.complete`."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise SpecError(f"{len(each)} sampling parameters for {len(prompts)} prompts.", "Give one each.")
        return await all_of(
            self._complete(prompt, one, min_version, max_staleness)
            for prompt, one in zip(prompts, each, strict=True)
        )

    async def score(self, prompts: list[Any], responses: list[str]) -> list[float]:
        """The reward of each response. Raises NotFoundError where the application has no reward."""
        reward = _there(self._reward, "reward")
        return await retry(lambda: reward.score.remote(prompts, responses))

    async def compare(self, prompts: list[Any], first: list[str], second: list[str]) -> list[float]:
        """The probability that each first response is the better one. Raises NotFoundError without a judge."""
        judge = _there(self._judge, "judge")
        return await retry(lambda: judge.compare.remote(prompts, first, second))

    async def describe(self) -> dict[str, Any]:
        """What a policy replica says of itself."""
        return await retry(lambda: self._policy.describe.remote())

    async def weights_store(self) -> Any:
        """The store actor of weight versions."""
        return await retry(lambda: self._policy.weights_store.remote())

    async def check_health(self) -> None:
        """Serve calls this regularly; it also ends an application whose owner is gone."""
        if self.config.owner is not None:
            await asyncio.to_thread(end_with_owner, self.config.owner)

    @app.get("/v1/models", response_model=ModelList, responses=errors(body=False))
    async def models(self) -> Response:
        """The one model."""
        model: ServedModel = {"id": self._name, "object": "model", "created": 0, "owned_by": "escala"}
        listed: ModelList = {"object": "list", "data": [model]}
        return answer_json(listed)

    @app.post(
        "/v1/completions",
        response_model=CompletionBody,
        responses={**errors(409), **or_stream("CompletionChunk")},
    )
    async def completions(self, asked: CompletionRequest) -> Response:
        """OpenAI's completions. With `stream`, the answer comes as events."""
        return await self._generate(asked, asked.prompts(), asked.max_tokens, clip=False)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletionBody,
        responses={**errors(409), **or_stream("ChatCompletionChunk")},
    )
    async def chat(self, asked: ChatRequest) -> Response:
        """OpenAI's chat completions. With `stream`, the answer comes as events."""
        limit = asked.max_completion_tokens or asked.max_tokens
        return await self._generate(asked, [asked.messages], limit or CHAT_TOKENS, clip=limit is None)

    @app.post("/score", response_model=ScoresBody, responses=errors())
    async def scores(self, asked: ScoreRequest) -> Response:
        """The reward of each response to its prompt."""
        answer: ScoresBody = {"scores": await self.score(asked.prompts, asked.responses)}
        return answer_json(answer)

    @app.post("/compare", response_model=VerdictsBody, responses=errors())
    async def comparisons(self, asked: CompareRequest) -> Response:
        """Each first response's probability to be better than the second one, by the judge."""
        answer: VerdictsBody = {"win": await self.compare(asked.prompts, asked.first, asked.second)}
        return answer_json(answer)

    @app.get("/weights", response_model=WeightsStatus, responses=errors(body=False))
    async def weights(self) -> Response:
        """The newest version, and what each replica serves."""
        store = await self.weights_store()
        answer: WeightsStatus = await store.describe.remote()
        return answer_json(answer)

    @app.get("/service", response_model=ServiceStatus, responses=errors(body=False))
    async def service(self) -> Response:
        """What the service used, by replica; what the governor measured and wants; what replicas can set."""
        name = serve.get_replica_context().app_name
        record = await asyncio.to_thread(board.read_service, name) or {}
        notes = await asyncio.to_thread(board.read_replicas, name)
        answer: ServiceStatus = {"record": record, "replicas": notes}
        return answer_json(answer)

    @app.get(OPENAPI, include_in_schema=False)
    async def openapi(self, request: Request) -> Response:
        """These routes, their models and errors."""
        return answer_json(document(request.app))

    @app.get(DOCS, include_in_schema=False)
    async def docs(self, request: Request) -> Response:
        """The same, to be read in a browser."""
        return docs_page(request.app)

    @property
    def _name(self) -> str:
        return self.config.name or self.config.model.rstrip("/").rpartition("/")[2]

    async def _generate(
        self,
        asked: CompletionRequest | ChatRequest,
        prompts: list[RequestPrompt],
        max_tokens: int,
        clip: bool,
    ) -> Response:
        if asked.model not in (None, self._name):
            raise NotFoundError(f"There is no model {asked.model!r} here.", f"Ask for {self._name}.")
        staleness = self.config.max_staleness if asked.max_staleness is None else asked.max_staleness
        written = format_of(self._name, asked)
        if len(prompts) * asked.n > CHOICES:
            raise SpecError(
                f"{len(prompts)} prompts of {asked.n} choices each are asked for.",
                f"{CHOICES} at most at a time.",
            )
        choices = [(prompt, params) for prompt in prompts for params in asked.sampling(max_tokens)]
        if asked.stream:
            if len(choices) > 1:
                raise SpecError(
                    "Only one choice of one prompt is streamed.", "Set n to 1, and give one prompt."
                )
            chunks = self._chunks(*choices[0], asked.min_version, staleness, clip)
            first = await anext(chunks)  # its errors still have a status of their own
            events = _events(written, first, chunks, asked.stream_options.include_usage)
            headers = {VERSION_HEADER: str(first.weights.version)}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        generated = await all_of(
            self._complete(prompt, params, asked.min_version, staleness, clip) for prompt, params in choices
        )
        body = written.body(generated, sum(g.prompt_tokens for g in generated[:: asked.n]))
        return answer_json(body, headers={VERSION_HEADER: str(body["weights_version"])})

    async def _complete(self, *arguments: Any) -> Generated:
        asked = time.time()
        return await retry(lambda: self._policy.complete.remote(*arguments, asked=asked))

    async def _chunks(self, *arguments: Any) -> AsyncGenerator[GeneratedChunk]:
        """A response in chunks; another replica is asked where one dies before the first chunk."""
        stream, asked = self._policy.options(stream=True).stream, time.time()
        for attempt in range(ATTEMPTS):
            begun = False
            try:
                async for chunk in stream.remote(*arguments, asked=asked):
                    begun = True
                    yield chunk
            except (RayTaskError, RayActorError, BackPressureError, DeploymentUnavailableError) as error:
                await again_or_raise(error, ATTEMPTS - 1 if begun else attempt)
            else:
                return
