"""A request's body: JSON to one of the models of `schemas`, bounded before anything in it is looked at. No I/O.

What is not served is refused by name, never ignored. What clients send without meaning anything by it is taken: null
for every field, and the values in NEUTRAL.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from escala.contract.errors import SpecError
from workloads.generation.protocol import STOP_STRINGS, STOP_TOKENS
from workloads.serving.schemas import PROMPT_TOKENS

M = TypeVar("M", bound=BaseModel)
CHOICES = 2048  # prompts times n of one request
FIELDS = 256
PARTS = 1 << 20
"""Lists, objects and fields of a body: parsing 5 million empty lists holds the others up for seconds."""
ITEMS = {"stop": STOP_STRINGS, "stop_token_ids": STOP_TOKENS, "prompt": PROMPT_TOKENS, "messages": 1 << 16}
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


def parse(kind: type[M], body: bytes) -> M:
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
