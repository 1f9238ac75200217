"""OpenAI's completions and chat completions: requests checked, responses and stream events built. No I/O.

What is not served is refused by name, never ignored. Beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`,
`ignore_eos`, `stop_token_ids`, and the bound on weights, `min_version` and `max_staleness`. Every response carries
`weights_version`, and the version's name as `system_fingerprint`.

What clients send without meaning anything by it is taken: null for every field, and the values in NEUTRAL.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from escala.contract.errors import SpecError
from workloads.data.messages import plain_messages
from workloads.generation.protocol import INT64_MAX, STOP_STRINGS, STOP_TOKENS, SamplingParams
from workloads.serving.records import Generated, Piece, Prompt

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for /v1/completions
CHOICES = 2048  # prompts times n of one request
FIELDS = 256
PARTS = (
    1 << 20
)  # lists, objects and fields of a body: parsing 5 million empty lists holds the others up for seconds
ITEMS = {"stop": STOP_STRINGS, "stop_token_ids": STOP_TOKENS, "prompt": 1 << 20, "messages": 1 << 16}
"""How long a list of a request may be; looked at before anything in it is."""
OF_PAIRS = 1 << 14  # /score and /compare
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "extra_body": ({},),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({}, []),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop": ("", []),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1,),
    "top_logprobs": (0,),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
"""Values that ask for nothing: other servers' defaults, which their clients and LangChain send along."""
MARKS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""A client's own; they change no answer anywhere."""
NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "seed", "min_version"),
    *("max_staleness", "max_tokens", "max_completion_tokens", "best_of", "top_logprobs"),
    *("presence_penalty", "frequency_penalty", "length_penalty", "typical_p", "min_tokens"),
)


class StreamOptions(BaseModel):
    """Whether a last event carries the tokens counted."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


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
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logit_bias: None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: list[StrictInt] = []
    ignore_eos: bool = False
    min_version: int = Field(0, ge=0)
    max_staleness: int | None = Field(None, ge=0)

    def sampling(self, max_tokens: int) -> list[SamplingParams]:
        """The parameters of each choice. Raises SpecError where one is out of range."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        if not -INT64_MAX - 1 <= seed <= INT64_MAX:
            raise SpecError("seed: is no 64-bit integer.", "Take one from -2^63 to 2^63 - 1.")
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
                seed=(seed + choice) % (INT64_MAX + 1),
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

    @field_validator("prompt", mode="plain")
    @classmethod
    def _one_kind(cls, prompt: Any) -> Any:
        """By hand: pydantic would try each of the four kinds on every token of a long list."""
        several = isinstance(prompt, list) and prompt
        lists = [prompt] if several and type(prompt[0]) is int else prompt
        tokens = several and all(isinstance(part, list) for part in lists)
        if tokens and sum(map(len, lists)) <= ITEMS["prompt"]:
            tokens = all(type(token) is int for part in lists for token in part)
        elif tokens:
            raise ValueError(f"more than {ITEMS['prompt']} tokens")
        if isinstance(prompt, str) or tokens or (several and all(isinstance(part, str) for part in prompt)):
            return prompt
        raise ValueError("give a text or tokens, or a list of texts or of lists of tokens")

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
    if sum(map(body.count, (b"[", b"{", b":"))) > PARTS:
        raise SpecError(f"The body has more than {PARTS} lists, objects and fields.", "Send less at a time.")
    try:
        asked = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:  # too deep and too long numbers as well
        raise SpecError(f"The body is not JSON: {str(error)[:200]}.", "Correct it.") from error
    if not isinstance(asked, dict) or len(asked) > FIELDS:
        raise SpecError(f"The body is no JSON object of at most {FIELDS} fields.", "Send one.")
    asked = {name: value for name, value in asked.items() if value is not None and name not in MARKS}
    for name, value in asked.items():
        _check_shape(name, value)
    try:
        return kind.model_validate({n: v for n, v in asked.items() if not _neutral(n, v, asked)})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100] or "the body"
        unknown = first["type"] == "extra_forbidden"
        message = "is not served here" if unknown else first["msg"].removeprefix("Value error, ")[:300]
        raise SpecError(f"{where}: {message}.", "Take it out, or correct it.") from error


def _check_shape(name: str, value: Any) -> None:
    """Before anything looks into a value. Raises SpecError."""
    if isinstance(value, list) and len(value) > (most := ITEMS.get(name, OF_PAIRS)):
        raise SpecError(f"{name[:100]}: {len(value)} items, of {most} at most.", "Send fewer at a time.")
    if name in NUMBERS and isinstance(value, bool):
        raise SpecError(f"{name}: is {str(value).lower()}.", "Give a number.")
    if name in NUMBERS and isinstance(value, int) and abs(value) > 1 << 64:
        raise SpecError(f"{name}: is an integer of {value.bit_length()} bits.", "Give a smaller number.")


def _neutral(name: str, value: Any, asked: dict[str, Any]) -> bool:
    """Whether a value asks for nothing."""
    if name == "best_of":
        return bool(value == asked.get("n", 1))
    if name == "logprobs" and "prompt" in asked:
        return value is False
    return any(type(value) is type(none) and value == none for none in NEUTRAL.get(name, ())) or (
        type(value) is float and value in NEUTRAL.get(name, ())
    )


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
