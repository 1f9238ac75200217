"""Prompts to token ids, beside the event loop: bounded before, long ones in a lane of their own.

A text has at least one token for as many characters as the vocabulary's longest token has; what is longer than a
context of those is refused unread. Threads help, for the tokenizer lets other threads run while it works.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from typing_extensions import TypeIs

from escala.contract.errors import DataError, EscalaError, SpecError
from workloads.data.chat import ChatTokenizer
from workloads.data.messages import Message
from workloads.generation.protocol import RequestFailed
from workloads.serving.records import RequestPrompt

LONG_CHARACTERS = 1 << 16  # tokenised in some 50 ms
THREADS = 2


class Tokenising:
    """The tokenizer of one replica.

    Args:
        max_context_tokens: no prompt may have more.
    """

    def __init__(self, tokenizer: ChatTokenizer, max_context_tokens: int) -> None:
        self.tokenizer, self.max_context_tokens = tokenizer, max_context_tokens
        vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
        self.most_characters = max_context_tokens * max(map(len, vocabulary), default=1)
        self._short = ThreadPoolExecutor(THREADS, "tokenise")
        self._long = ThreadPoolExecutor(1, "tokenise-long")

    async def tokens(self, prompt: RequestPrompt) -> list[int]:
        """Token ids of a prompt in any form.

        Raises SpecError for one that is longer than the context; DataError for a chat that the model's template
        refuses; RequestFailed where template or tokenizer fail otherwise.
        """
        if isinstance(prompt, (list, tuple)) and len(prompt) > self.max_context_tokens:
            raise self._too_long(f"{len(prompt)} tokens or messages")
        if not isinstance(prompt, str) and not is_chat(prompt):
            return list(prompt)
        length = characters(prompt)
        if length > self.most_characters:
            raise self._too_long(f"{length} characters")
        pool = self._long if length > LONG_CHARACTERS else self._short
        return await asyncio.get_running_loop().run_in_executor(pool, self._tokenise, prompt)

    def _tokenise(self, prompt: str | list[Message]) -> list[int]:
        try:
            return self.tokenizer.prompt(prompt)
        except EscalaError:
            raise
        except RecursionError as error:
            raise DataError("the chat is nested too deeply.", "Send plain messages.") from error
        except BaseException as error:
            raise RequestFailed(
                f"The prompt was not tokenised: {type(error).__name__}: {str(error)[:200]}.",
                "Send it as token ids, or another one.",
            ) from error

    def _too_long(self, what: str) -> SpecError:
        return SpecError(
            f"The prompt has {what}: more than the context of {self.max_context_tokens} tokens can hold.",
            "Shorten it.",
        )

    def close(self) -> None:
        """No more prompts; what is being read is finished by itself."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)


def is_chat(prompt: list[int] | list[Message]) -> TypeIs[list[Message]]:
    """Whether a prompt has messages, and not tokens."""
    return bool(prompt) and isinstance(prompt[0], Mapping)


def characters(prompt: Any) -> int:
    """Of all texts in a prompt."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, Mapping):
        return sum(map(characters, prompt.values()))
    return sum(map(characters, prompt)) if isinstance(prompt, (list, tuple)) else 0
