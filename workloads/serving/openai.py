"""OpenAI's completions and chat completions: requests checked, responses and stream events built. No I/O.

What is not served is refused by name, never ignored. Beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`,
`ignore_eos`, `stop_token_ids`, and the bound on weights, `min_version` and `max_staleness`. Every response carries
`weights_version`, and the version's name as `system_fingerprint`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from escala.errors import SpecError
from workloads.data.messages import plain_messages
from workloads.generation.protocol import SamplingParams
from workloads.serving.records import Generated, Piece, Prompt

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for /v1/completions


class StreamOptions(BaseModel):
    """Whether a last event carries the tokens counted."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = Field(
        None, description="of the first choice; the next have the next ones; None: random"
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = Field(None, description="the client's own mark; nothing is done with it")
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logit_bias: None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_version: int = Field(0, ge=0)
    max_staleness: int | None = Field(None, ge=0)

    def sampling(self, max_tokens: int) -> list[SamplingParams]:
        """The parameters of each choice. Raises SpecError where one is out of range."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                stop_token_ids=tuple(self.stop_token_ids),
                stop=tuple(stop),
                seed=seed + choice,
                ignore_eos=self.ignore_eos,
            )
            for choice in range(self.n)
        ]


class CompletionRequest(_Asked):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(DEFAULT_COMPLETION_TOKENS, ge=1)
    logprobs: int | None = Field(None, ge=0, le=0, description="0: of the tokens drawn; more are not kept")
    echo: Literal[False] = False
    best_of: None = None
    suffix: None = None

    def prompts(self) -> list[Prompt]:
        """One or several."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], AfterValidator(plain_messages)]
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, description="None: what the service gives at most")
    logprobs: bool = False
    top_logprobs: Literal[0] | None = None
    tools: None = None
    response_format: None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ")
        return self


def parse(kind: type[Any], body: bytes) -> Any:
    """A request's body. Raises SpecError, naming the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        unknown = first["type"] == "extra_forbidden"
        message = "is not served here" if unknown else first["msg"]
        raise SpecError(f"{where}: {message}.", "Take it out, or correct it.") from error


@dataclass(frozen=True)
class Answer:
    """What the parts of one answer have in common."""

    id: str
    model: str
    created: int
    chat: bool
    logprobs: bool

    def body(self, choices: Sequence[Generated], prompt_tokens: int) -> dict[str, Any]:
        """A whole response; its version is the oldest of the choices'."""
        made = sum(len(c.completion.token_ids) for c in choices)
        oldest = min(choices, key=lambda c: c.weights.version).weights
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": usage(prompt_tokens, made),
            "system_fingerprint": oldest.name,
            "weights_version": oldest.version,
        }

    def event(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """A stream's event."""
        output = piece.output
        choice: dict[str, Any] = {"index": index, "finish_reason": output.finish_reason}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = {**role, "content": output.text}
        else:
            choice["text"] = output.text
        choice["logprobs"] = self._logprobs(output.token_ids, output.logprobs)
        return {
            **self._head("chat.completion.chunk" if self.chat else "text_completion"),
            "choices": [choice],
            "system_fingerprint": piece.weights.name,
            "weights_version": piece.weights.version,
        }

    def usage_event(self, prompt_tokens: int, made: int) -> dict[str, Any]:
        """The last event, where it was asked for."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return {**head, "choices": [], "usage": usage(prompt_tokens, made)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, generated: Generated) -> dict[str, Any]:
        completion = generated.completion
        choice: dict[str, Any] = {"index": index, "finish_reason": completion.finish_reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": completion.text}
        else:
            choice["text"] = completion.text
        choice["logprobs"] = self._logprobs(completion.token_ids, completion.logprobs)
        return choice

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any] | None:
        """Tokens are named by their ids (a piece of a character has no text)."""
        if not self.logprobs:
            return None
        names = [f"token_id:{token}" for token in tokens]
        if not self.chat:
            return {
                "tokens": names,
                "token_logprobs": list(logprobs),
                "top_logprobs": None,
                "text_offset": None,
            }
        pairs = zip(names, logprobs, strict=True)
        return {"content": [{"token": n, "logprob": p, "bytes": None, "top_logprobs": []} for n, p in pairs]}


def answer(model: str, request: CompletionRequest | ChatRequest) -> Answer:
    """The head of an answer to `request`, with a new id."""
    chat = isinstance(request, ChatRequest)
    logprobs = request.logprobs is not None and request.logprobs is not False
    mark = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    return Answer(mark, model, int(time.time()), chat, logprobs)


def usage(prompt_tokens: int, made: int) -> dict[str, int]:
    """Tokens counted."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
    }


def server_sent(event: dict[str, Any]) -> str:
    """A line of text/event-stream."""
    return f"data: {json.dumps(event)}\n\n"


def error_body(message: str, hint: str, kind: str) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    text = f"{message} {hint}".strip()
    return {"error": {"message": text, "type": kind, "param": None, "code": kind}}
