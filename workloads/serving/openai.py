"""OpenAI's responses and stream events: built from what a replica gave. No I/O."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from escala.rollouts.weights import WeightVersion
from workloads.serving.records import Generated, GeneratedChunk
from workloads.serving.schemas import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionBody,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    CompletionBody,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionRequest,
    ErrorBody,
    TokenLogprob,
    TokenUsage,
)


@dataclass(frozen=True)
class CompletionFormat:
    """How a response to /v1/completions is written: what its parts have in common."""

    id: str
    model: str
    created: int
    logprobs: bool

    def body(self, choices: Sequence[Generated], prompt_tokens: int) -> CompletionBody:
        """A whole response; its version is the oldest of the choices'."""
        weights = oldest(choices)
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": usage(prompt_tokens, tokens_of(choices)),
            "system_fingerprint": weights.name,
            "weights_version": weights.version,
        }

    def chunk(self, index: int, given: GeneratedChunk, first: bool) -> CompletionChunk:
        """A stream's event."""
        output = given.output
        choice: CompletionChoice = {
            "index": index,
            "finish_reason": output.finish_reason,
            "text": output.text,
            "logprobs": self._logprobs(output.token_ids, output.logprobs),
        }
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            "system_fingerprint": given.weights.name,
            "weights_version": given.weights.version,
        }

    def usage_chunk(self, prompt_tokens: int, made: int) -> CompletionChunk:
        """The last event, where it was asked for."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [],
            "usage": usage(prompt_tokens, made),
        }

    def _choice(self, index: int, generated: Generated) -> CompletionChoice:
        completion = generated.completion
        return {
            "index": index,
            "finish_reason": completion.finish_reason,
            "text": completion.text,
            "logprobs": self._logprobs(completion.token_ids, completion.logprobs),
        }

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[float]) -> CompletionLogprobs | None:
        if not self.logprobs:
            return None
        return {
            "tokens": names(tokens),
            "token_logprobs": list(logprobs),
            "top_logprobs": None,
            "text_offset": None,
        }


@dataclass(frozen=True)
class ChatFormat:
    """How a response to /v1/chat/completions is written: what its parts have in common."""

    id: str
    model: str
    created: int
    logprobs: bool

    def body(self, choices: Sequence[Generated], prompt_tokens: int) -> ChatCompletionBody:
        """A whole response; its version is the oldest of the choices'."""
        weights = oldest(choices)
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": usage(prompt_tokens, tokens_of(choices)),
            "system_fingerprint": weights.name,
            "weights_version": weights.version,
        }

    def chunk(self, index: int, given: GeneratedChunk, first: bool) -> ChatCompletionChunk:
        """A stream's event."""
        output = given.output
        text = output.text
        delta: ChatDelta = {"role": "assistant", "content": text} if first else {"content": text}
        choice: ChatChunkChoice = {
            "index": index,
            "finish_reason": output.finish_reason,
            "delta": delta,
            "logprobs": self._logprobs(output.token_ids, output.logprobs),
        }
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            "system_fingerprint": given.weights.name,
            "weights_version": given.weights.version,
        }

    def usage_chunk(self, prompt_tokens: int, made: int) -> ChatCompletionChunk:
        """The last event, where it was asked for."""
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [],
            "usage": usage(prompt_tokens, made),
        }

    def _choice(self, index: int, generated: Generated) -> ChatChoice:
        completion = generated.completion
        return {
            "index": index,
            "finish_reason": completion.finish_reason,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": self._logprobs(completion.token_ids, completion.logprobs),
        }

    def _logprobs(self, tokens: Sequence[int], logprobs: Sequence[float]) -> ChatLogprobs | None:
        if not self.logprobs:
            return None
        pairs = zip(names(tokens), logprobs, strict=True)
        content: list[TokenLogprob] = [
            {"token": name, "logprob": logprob, "bytes": None, "top_logprobs": []} for name, logprob in pairs
        ]
        return {"content": content}


Format = CompletionFormat | ChatFormat


def format_of(model: str, request: CompletionRequest | ChatRequest) -> Format:
    """How the response to `request` is written, with a new id."""
    created = int(time.time())
    if isinstance(request, ChatRequest):
        return ChatFormat(f"chatcmpl-{secrets.token_hex(12)}", model, created, request.logprobs)
    logprobs = request.logprobs is not None
    return CompletionFormat(f"cmpl-{secrets.token_hex(12)}", model, created, logprobs)


def names(tokens: Sequence[int]) -> list[str]:
    """Tokens are named by their ids: a piece of a character has no text."""
    return [f"token_id:{token}" for token in tokens]


def oldest(choices: Sequence[Generated]) -> WeightVersion:
    """The weights of a response of several choices."""
    return min(choices, key=lambda c: c.weights.version).weights


def tokens_of(choices: Sequence[Generated]) -> int:
    """That were generated for all choices."""
    return sum(len(c.completion.token_ids) for c in choices)


def usage(prompt_tokens: int, made: int) -> TokenUsage:
    """Tokens counted."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
    }


def server_sent(event: Mapping[str, object]) -> str:
    """A line of text/event-stream."""
    return f"data: {json.dumps(event)}\n\n"


def error_body(message: str, hint: str, kind: str) -> ErrorBody:
    """OpenAI's shape of an error."""
    text = f"{message} {hint}".strip()
    return {"error": {"message": text, "type": kind, "param": None, "code": kind}}
