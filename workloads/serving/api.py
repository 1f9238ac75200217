"""The `api` deployment: OpenAI's HTTP interface, /score and /compare, and the same by a Python handle.

It holds no model, so that requests have somewhere to wait while `policy` has no replica. A request whose replica dies
is asked again on another one, unless its client has seen a part of the answer. Without a token only this machine is
answered.

What the class uses stands above it or in another module, and annotations are no strings (no `annotations` from the
future): Serve pickles the class by value while this module is being imported, with the names that its code uses.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from escala.contract.errors import NotFoundError, SpecError
from escala.schema.serve import ServeConfig
from workloads.generation.protocol import SamplingParams
from workloads.serving.access import authorise
from workloads.serving.guard import answer_error, answer_json, check_origin, describe, new_app, read_body
from workloads.serving.loopback import keep_serve_on_loopback
from workloads.serving.openai import (
    CHOICES,
    Answer,
    ChatRequest,
    CompletionRequest,
    answer,
    parse,
    server_sent,
)
from workloads.serving.owner import end_with_owner
from workloads.serving.records import Generated, Piece, Prompt
from workloads.serving.retry import ATTEMPTS, again_or_raise, patient, together
from workloads.serving.scores import CompareRequest, ScoreRequest

CHAT_TOKENS = 1 << 20  # clipped to what the service and the context leave
VERSION_HEADER = "x-escala-weights-version"
app = new_app()


def _there(handle: Any, name: str) -> Any:
    if handle is None:
        raise NotFoundError(
            f"This application has no {name}.", f"Add a `{name}` section to its configuration."
        )
    return handle


async def _events(head: Answer, first: Piece, rest: AsyncGenerator[Piece], usage: bool) -> AsyncIterator[str]:
    made = len(first.output.token_ids)
    try:
        async with aclosing(rest):
            yield server_sent(head.event(0, first, first=True))
            async for piece in rest:
                made += len(piece.output.token_ids)
                yield server_sent(head.event(0, piece, first=False))
    except Exception as error:  # noqa: BLE001  too late for a status: the client's library raises on this event
        yield server_sent(describe(error))
        return
    if usage:
        yield server_sent(head.usage_event(first.prompt_tokens, made))
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
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        min_version: int = 0,
        max_staleness: int | None = None,
    ) -> list[Generated]:
        """A response to each prompt, in order. One `params` for all, or one each. Raises as `Policy.complete`."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise SpecError(f"{len(each)} sampling parameters for {len(prompts)} prompts.", "Give one each.")
        return await together(
            self._complete(prompt, one, min_version, max_staleness)
            for prompt, one in zip(prompts, each, strict=True)
        )

    async def score(self, prompts: list[Any], responses: list[str]) -> list[float]:
        """The reward of each response. Raises NotFoundError where the application has no reward."""
        reward = _there(self._reward, "reward")
        return await patient(lambda: reward.score.remote(prompts, responses))

    async def compare(self, prompts: list[Any], first: list[str], second: list[str]) -> list[float]:
        """The probability that each first response is the better one. Raises NotFoundError without a judge."""
        judge = _there(self._judge, "judge")
        return await patient(lambda: judge.compare.remote(prompts, first, second))

    async def describe(self) -> dict[str, Any]:
        """What a policy replica says of itself."""
        return await patient(lambda: self._policy.describe.remote())

    async def weights_store(self) -> Any:
        """The store actor of weight versions."""
        return await patient(lambda: self._policy.weights_store.remote())

    async def check_health(self) -> None:
        """Serve asks; who owns the application is looked after by the way."""
        if self.config.owner is not None:
            await asyncio.to_thread(end_with_owner, self.config.owner)

    @app.get("/v1/models")
    async def models(self, request: Request) -> Response:
        """The one model."""

        async def work() -> Response:
            model = {"id": self._name, "object": "model", "created": 0, "owned_by": "escala"}
            return answer_json({"object": "list", "data": [model]})

        return await self._answered(request, work)

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        """OpenAI's completions."""

        async def work() -> Response:
            asked = parse(CompletionRequest, await read_body(request))
            return await self._generate(asked, asked.prompts(), asked.max_tokens, clip=False)

        return await self._answered(request, work)

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions."""

        async def work() -> Response:
            asked = parse(ChatRequest, await read_body(request))
            limit = asked.max_completion_tokens or asked.max_tokens
            return await self._generate(asked, [asked.messages], limit or CHAT_TOKENS, clip=limit is None)

        return await self._answered(request, work)

    @app.post("/score")
    async def scores(self, request: Request) -> Response:
        """Rewards: {"prompts": [...], "responses": [...]} to {"scores": [...]}."""

        async def work() -> Response:
            asked = parse(ScoreRequest, await read_body(request))
            return answer_json({"scores": await self.score(asked.prompts, asked.responses)})

        return await self._answered(request, work)

    @app.post("/compare")
    async def comparisons(self, request: Request) -> Response:
        """Verdicts: {"prompts", "first", "second"} to {"win": [...]}, each first response's probability to win."""

        async def work() -> Response:
            asked = parse(CompareRequest, await read_body(request))
            return answer_json({"win": await self.compare(asked.prompts, asked.first, asked.second)})

        return await self._answered(request, work)

    @app.get("/weights")
    async def weights(self, request: Request) -> Response:
        """The newest version, and what each replica serves."""

        async def work() -> Response:
            store = await self.weights_store()
            return answer_json(await store.describe.remote())

        return await self._answered(request, work)

    @property
    def _name(self) -> str:
        return self.config.name or self.config.model.rstrip("/").rpartition("/")[2]

    async def _answered(self, request: Request, work: Callable[[], Awaitable[Response]]) -> Response:
        """`work`, for those who may ask; errors in OpenAI's shape."""
        try:
            authorise(request, self.config.token_sha256)
            check_origin(request)
            return await work()
        except Exception as error:  # noqa: BLE001  of this request alone
            return answer_error(error)

    async def _generate(
        self, asked: CompletionRequest | ChatRequest, prompts: list[Prompt], max_tokens: int, clip: bool
    ) -> Response:
        if asked.model not in (None, self._name):
            raise NotFoundError(f"There is no model {asked.model!r} here.", f"Ask for {self._name}.")
        staleness = self.config.max_staleness if asked.max_staleness is None else asked.max_staleness
        head = answer(self._name, asked)
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
            pieces = self._pieces(*choices[0], asked.min_version, staleness, clip)
            first = await anext(pieces)  # its errors still have a status of their own
            events = _events(head, first, pieces, asked.stream_options.include_usage)
            headers = {VERSION_HEADER: str(first.weights.version)}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        generated = await together(
            self._complete(prompt, params, asked.min_version, staleness, clip) for prompt, params in choices
        )
        body = head.body(generated, sum(g.prompt_tokens for g in generated[:: asked.n]))
        return answer_json(body, headers={VERSION_HEADER: str(body["weights_version"])})

    async def _complete(self, *arguments: Any) -> Generated:
        return await patient(lambda: self._policy.complete.remote(*arguments))

    async def _pieces(self, *arguments: Any) -> AsyncGenerator[Piece]:
        """A response in pieces; another replica is asked where one dies before the first piece."""
        stream = self._policy.options(stream=True).stream
        for attempt in range(ATTEMPTS):
            begun = False
            try:
                async for piece in stream.remote(*arguments):
                    begun = True
                    yield piece
            except (RayTaskError, RayActorError, BackPressureError, DeploymentUnavailableError) as error:
                await again_or_raise(error, ATTEMPTS - 1 if begun else attempt)
            else:
                return
