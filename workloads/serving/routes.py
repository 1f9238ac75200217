"""The HTTP app and its routes: who may ask, bodies to models, errors in OpenAI's shape, /openapi.json and /docs.

FastAPI makes the documents from the routes' models. A route here checks the request and reads its body itself, bounded,
and hands FastAPI the model: what is refused is refused with our messages, and before it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter
from ray import serve
from starlette.exceptions import HTTPException

from workloads.serving.access import authorise
from workloads.serving.guard import answer_error, answer_json, check_origin, read_body
from workloads.serving.openai import error_body
from workloads.serving.parsing import parse
from workloads.serving.schemas import ChatCompletionChunk, CompletionChunk, ErrorBody

OPENAPI, DOCS = "/openapi.json", "/docs"
REF = "#/components/schemas/{model}"
CHUNKS = {"CompletionChunk": CompletionChunk, "ChatCompletionChunk": ChatCompletionChunk}
"""Events of streams: FastAPI documents one model for a status, so that these are added to its document."""
MEANING = {
    400: "A field, a prompt or the body as a whole cannot be served; the message names it.",
    401: "The bearer token is missing or wrong; without one, the request is of another machine.",
    403: "The request is of a web page of another origin.",
    404: "There is no such model, or no reward or judge here.",
    408: "The body did not come in time.",
    409: "The bound on weights (min_version, max_staleness) cannot be kept.",
    413: "The body is too large.",
    415: "The body is not declared as JSON, or is compressed.",
    500: "An error of the service.",
    503: "No replica answers now: ask again.",
}
ALWAYS, WITH_BODY = (401, 403, 500, 503), (400, 404, 408, 413, 415)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ReadRequest(Request):
    """A request whose body has been read: FastAPI is given the model, and checks nothing again."""

    def __init__(self, request: Request, body: bytes, model: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._read, self._model = body, model

    async def body(self) -> bytes:
        """As it came."""
        return self._read

    async def json(self) -> BaseModel:
        """The model that it was parsed to."""
        return self._model


class GuardedRoute(APIRoute):
    """A route of the service: `authorise`, `check_origin`, `read_body`, `parse`, then its method. Its errors, and the
    method's, are answered in OpenAI's shape.
    """

    def get_route_handler(self) -> Handler:
        """See APIRoute."""
        answer = super().get_route_handler()
        model: Any = self.body_field.field_info.annotation if self.body_field else None

        async def guarded(request: Request) -> Response:
            try:
                authorise(request, serve.get_replica_context().servable_object.config.token_sha256)
                check_origin(request)
                if model is not None:
                    body = await read_body(request)
                    request = ReadRequest(request, body, parse(model, body))
                return await answer(request)
            except Exception as error:  # noqa: BLE001  of this request alone
                return answer_error(error)

        return guarded


def errors(*statuses: int, body: bool = True) -> dict[int | str, dict[str, Any]]:
    """What a route documents as its errors, beside those of every route."""
    every = sorted({*ALWAYS, *(WITH_BODY if body else ()), *statuses})
    documented = {status: {"model": ErrorBody, "description": MEANING[status]} for status in every}
    return {**documented, "default": {"model": ErrorBody, "description": "Any other error."}}


def or_stream(chunk: str) -> dict[int | str, dict[str, Any]]:
    """That a route's answer may be a stream of events, the schema of one of CHUNKS each, and `[DONE]` at the end."""
    events = {"schema": {"$ref": REF.format(model=chunk)}}
    return {200: {"content": {"text/event-stream": events}}}


def new_app() -> FastAPI:
    """An app whose unknown paths and methods get OpenAI's error object. `document` and `docs_page` are its documents:
    FastAPI's own routes for them would answer everybody.
    """
    app = FastAPI(
        title="escala rollouts",
        description="OpenAI's completions and chat completions, rewards, verdicts, and the versions of weights.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.router.route_class = GuardedRoute
    app.add_exception_handler(HTTPException, _no_such_route)
    return app


def document(app: FastAPI) -> dict[str, Any]:
    """OpenAPI's description of the routes."""
    described = app.openapi()
    schemas = described["components"]["schemas"]
    for name, chunk in CHUNKS.items():
        schema = TypeAdapter(chunk).json_schema(mode="serialization", ref_template=REF)
        schemas |= {**schema.pop("$defs", {}), name: schema}
    return described


def docs_page(app: FastAPI) -> Response:
    """The same for a browser. The page takes Swagger UI from its public address; without a network, read OPENAPI."""
    return get_swagger_ui_html(openapi_url=OPENAPI, title=app.title)


async def _no_such_route(request: Request, error: Exception) -> Response:
    status, said = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "failed")
    headers = error.headers if isinstance(error, HTTPException) else None
    body = error_body(f"{request.method} {request.url.path[:100]}: {said}.", "", "NotFoundError")
    return answer_json(body, status, headers)
