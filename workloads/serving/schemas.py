"""What the rollout service's routes take and give: one place, which /openapi.json is made from.

Requests are pydantic models. Responses are typed dictionaries: they are written as they are built, a stream's event for
every token, and pydantic reads their types for the documents.

Beyond OpenAI's fields: `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`, `stop_token_ids`, and the bound on
weights, `min_version` and `max_staleness`. Every response carries `weights_version`, and the version's name as
`system_fingerprint`.
"""

from __future__ import annotations

import secrets
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic needs these before Python 3.12
    Self,
    cast,
)

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

from escala.contract.errors import SpecError
from workloads.data.messages import plain_messages
from workloads.generation.protocol import INT64_MAX, FinishReason, SamplingParams
from workloads.serving.records import RequestPrompt

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for /v1/completions
PROMPT_TOKENS = 1 << 20  # of all prompts of a request


class StreamOptions(BaseModel):
    """Whether a last event carries the tokens counted."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(BaseModel):
    """What both kinds of request share. Null is taken for every field, and means its default."""

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


class CompletionRequest(GenerationRequest):
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
        if tokens and sum(map(len, lists)) <= PROMPT_TOKENS:
            tokens = all(type(token) is int for part in lists for token in part)
        elif tokens:
            raise ValueError(f"more than {PROMPT_TOKENS} tokens")
        if isinstance(prompt, str) or tokens or (several and all(isinstance(part, str) for part in prompt)):
            return prompt
        raise ValueError("give a text or tokens, or a list of texts or of lists of tokens")

    def prompts(self) -> list[RequestPrompt]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):  # then all are
            return [self.prompt]
        return list(cast("list[RequestPrompt]", self.prompt))


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], AfterValidator(plain_messages)]
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, description="None: what the service gives at most")
    logprobs: bool = False
    top_logprobs: Literal[0] | None = None
    tools: None = None
    response_format: None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ")
        return self


Chat = Annotated[list[dict[str, Any]], AfterValidator(plain_messages)]


class ScoreRequest(BaseModel):
    """POST /score."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str | Chat]
    responses: list[str]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.prompts) != len(self.responses):
            raise ValueError(f"{len(self.prompts)} prompts, and {len(self.responses)} responses")
        return self


class CompareRequest(BaseModel):
    """POST /compare."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str | Chat]
    first: list[str]
    second: list[str]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if not len(self.prompts) == len(self.first) == len(self.second):
            raise ValueError(
                f"{len(self.prompts)} prompts, {len(self.first)} and {len(self.second)} responses"
            )
        return self


class TokenUsage(TypedDict):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(TypedDict):
    """Of the tokens that were drawn, named by their ids (`token_id:5`): a piece of a character has no text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None
    text_offset: None


class CompletionChoice(TypedDict):
    """One text, or in a stream's event what has been added to it."""

    index: int
    finish_reason: FinishReason | None
    text: str
    logprobs: CompletionLogprobs | None


class CompletionBody(TypedDict):
    """The answer of /v1/completions. The weights are the oldest of its choices'."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage
    system_fingerprint: str
    weights_version: int


class CompletionChunk(TypedDict):
    """A stream's event of /v1/completions; the last one has `usage` alone, where it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: NotRequired[str]
    weights_version: NotRequired[int]
    usage: NotRequired[TokenUsage]


class TokenLogprob(TypedDict):
    """Of one token that was drawn, named by its id."""

    token: str
    logprob: float
    bytes: None
    top_logprobs: list[None]


class ChatLogprobs(TypedDict):
    """Of the tokens that were drawn."""

    content: list[TokenLogprob]


class ChatMessage(TypedDict):
    """The assistant's."""

    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    """One message."""

    index: int
    finish_reason: FinishReason | None
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatDelta(TypedDict):
    """What an event adds to a message; the first one has its role."""

    role: NotRequired[Literal["assistant"]]
    content: str


class ChatChunkChoice(TypedDict):
    """Of a stream's event."""

    index: int
    finish_reason: FinishReason | None
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatCompletionBody(TypedDict):
    """The answer of /v1/chat/completions. The weights are the oldest of its choices'."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    system_fingerprint: str
    weights_version: int


class ChatCompletionChunk(TypedDict):
    """A stream's event of /v1/chat/completions; the last one has `usage` alone, where it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: NotRequired[str]
    weights_version: NotRequired[int]
    usage: NotRequired[TokenUsage]


class ServedModel(TypedDict):
    """The policy."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ServedModel]


class ScoresBody(TypedDict):
    """The answer of /score: the reward of each response."""

    scores: list[float]


class VerdictsBody(TypedDict):
    """The answer of /compare: each first response's probability to be the better one."""

    win: list[float]


class WeightsStatus(TypedDict):
    """The answer of /weights: the newest version, whether it can still be had, what each replica serves, and which
    kernels all of them multiply with (None before the first one has started).
    """

    newest: int
    name: str | None
    lost: bool
    replicas: dict[str, int]
    kernels: str | None


class ServiceStatus(TypedDict):
    """The answer of /service: what Serve's controller wrote last (`escala.rollouts.serve_hook`), and what each replica
    can set or read of its device.
    """

    record: dict[str, Any]
    replicas: dict[str, dict[str, Any]]


class ErrorDetail(TypedDict):
    """What is wrong, and how it is put right. `type` is the class of the error."""

    message: str
    type: str
    param: None
    code: str


class ErrorBody(TypedDict):
    """OpenAI's shape of an error: of every status but 200, and the last event of a stream that failed."""

    error: ErrorDetail
