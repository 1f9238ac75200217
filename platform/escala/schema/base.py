"""What every configuration class shares: how numbers are read, and how large they may be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)

LARGEST = 1e18
"""Of any whole number: above all tokens, bytes and seeds that there are, and within 64 bits."""
LARGEST_FLOAT = 3e38
"""Of any other number: what is computed from it in fp32 is finite."""
LARGEST_OF: dict[str, float] = {
    "n_layers": 10_000,
    "d_model": 1e6,
    "n_heads": 1e5,
    "n_kv_heads": 1e5,
    "head_dim": 1e5,
    "heads": 1e5,
    "head_size": 1e5,
    "d_ff": 1e7,
    "vocab_size": 1e8,
    "max_context_tokens": 1e9,
    "context_tokens": 1e9,
    "contexts": 1e9,
    "window_tokens": 1e9,
    "widths": 1e6,
    "experts": 1e5,
    "chosen": 1e5,
    "shared_experts": 1e4,
    "every": 1e4,
    "rank": 1e6,
    "steps": 1e9,
    "warmup_steps": 1e9,
    "batch_sequences": 1e7,
    "micro_batch_sequences": 1e7,
    "micro_batch_tokens": 1e10,
    "prompts": 1e7,
    "responses_per_prompt": 1e6,
    "epochs": 1e6,
    "minibatches": 1e7,
    "keep_checkpoints": 1e6,
    "workers": 1e6,
    "devices": 1e7,
    "cpus_per_worker": 1e5,
    "threads_per_worker": 1e5,
    "replicas": 1e5,
    "min_replicas": 1e5,
    "max_replicas": 1e5,
    "replica_cpus": 1e5,
    "replica_gpus": 1e3,
    "max_running": 1e5,
    "max_response_tokens": 1e8,
    "block_tokens": 1e6,
    "prefill_tokens": 1e8,
    "tokens": 1e9,
    "cache_tokens": 1e11,
    "train_tokens": 1e16,
    "evaluation_tokens": 1e15,
    "max_characters": 1e16,
    "train_characters": 1e16,
    "points": 1e5,
    "count": 1e5,
    "features": 1e5,
    "max_count": 1e5,
    "landmarks": 1e5,
    "concurrency": 1e5,
    "timeout_seconds": 1e8,
    "max_seconds": 1e10,
    "max_flops": 1e40,
}
"""Of single fields, by name: several times what the largest machine holds, so that a slip of the finger is an error
before anything is computed from it."""


class Strict(BaseModel):
    """Unknown keys fail; values are frozen once checked. Numbers are finite, of a size that a machine has, and neither
    texts nor booleans; a whole float (4e5) is an integer.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False
    )

    @model_validator(mode="wrap")
    @classmethod
    def _read_numbers(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        """Before any other check, since some derive one field from another."""
        if isinstance(data, Mapping):
            fields = cls.model_fields
            data = {k: _number(v, fields[k].annotation) if k in fields else v for k, v in data.items()}
        return handler(data)

    @field_validator("*")
    @classmethod
    def _of_a_machine(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        for number in _numbers(value):
            most = LARGEST_OF.get(name, LARGEST if isinstance(number, int) else LARGEST_FLOAT)
            if abs(number) > most:
                raise ValueError(f"must be at most {most:g}: no machine has more")
        return value


def _number(value: Any, annotation: Any) -> Any:
    """4e5 as 400000 where the field takes integers and no floats, in lists too. A boolean for Literal[0, 1], which
    pydantic takes for 1, becomes the word, which it refuses.
    """
    if isinstance(value, list):
        return [_number(item, annotation) for item in value]
    if not isinstance(value, bool | float):
        return value
    leaves = _leaves(annotation)
    if isinstance(value, bool):
        return str(value).lower() if int in leaves and bool not in leaves else value
    return int(value) if value.is_integer() and int in leaves and float not in leaves else value


def _leaves(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Literal:
        return {type(option) for option in get_args(annotation)}
    inner = get_args(annotation)
    return set().union(*(_leaves(each) for each in inner)) if inner else {annotation}


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def absolute_path(path: str) -> str:
    """A path as the user typed it, from the folder where it was typed."""
    return str(Path(path).expanduser().absolute())


StoredPath = Annotated[str, AfterValidator(absolute_path)]
"""A path as the user typed it, made absolute where it was typed: the driver runs in another directory."""
