"""Traces of requests: when each came and how many tokens it had. Recorded (CSV) or seeded (YAML, `TraceConfig`).

A CSV has the columns `seconds,prompt_tokens,response_tokens`, or those of Azure's public traces of LLM inference
(Patel et al. 2024): `TIMESTAMP,ContextTokens,GeneratedTokens`.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from escala import documents, spec
from escala.contract.errors import NotFoundError, SpecError
from escala.schema.traces import TokenRange, TraceConfig

LARGEST_BYTES = 1 << 30  # of a recorded trace
LARGEST_TOKENS = 10_000_000  # of a request


@dataclass(frozen=True)
class Arrival:
    """One request: when it came, after the trace's begin, and its tokens."""

    seconds: float
    prompt_tokens: int
    response_tokens: int


def read_trace(path: Path) -> list[Arrival]:
    """The requests in `path`, in the order in which they came.

    Raises NotFoundError where there is no such file, SpecError for one that is no trace, with its line.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}", "give a trace: a CSV, or a seeded one as YAML")
    if path.suffix in (".yaml", ".yml"):
        config: TraceConfig = spec.validate(TraceConfig, documents.read_yaml(path), path.name)
        return seeded(config)
    if path.stat().st_size > LARGEST_BYTES:
        raise SpecError(f"{path.name} has more than {LARGEST_BYTES >> 30} GiB", "cut it")
    found = sorted(_recorded(path), key=lambda arrival: arrival.seconds)
    if not found:
        raise SpecError(f"{path.name} has no requests", f"write rows under {', '.join(COLUMNS)}")
    first = found[0].seconds
    return [Arrival(a.seconds - first, a.prompt_tokens, a.response_tokens) for a in found]


def seeded(config: TraceConfig) -> list[Arrival]:
    """The trace of a seed: Poisson arrivals, whose rate bursts change, with uniform numbers of tokens."""
    draw = random.Random(config.seed)
    found = []
    for begin, end, rate in _rates(config):
        at = begin
        while rate > 0 and (at := at + draw.expovariate(rate)) < end:
            found.append(
                Arrival(at, _drawn(draw, config.prompt_tokens), _drawn(draw, config.response_tokens))
            )
    if not found:
        raise SpecError("the trace has no requests", "raise requests_per_second, or seconds")
    return found


def _rates(config: TraceConfig) -> Iterator[tuple[float, float, float]]:
    """(begin, end, requests a second), one after another."""
    at = 0.0
    for burst in config.bursts:
        begin = min(burst.at_seconds, config.seconds)
        end = min(begin + burst.seconds, config.seconds)
        yield at, begin, config.requests_per_second
        yield begin, end, burst.requests_per_second
        at = end
    yield at, config.seconds, config.requests_per_second


def _drawn(draw: random.Random, bounds: TokenRange) -> int:
    return draw.randint(*bounds)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _moment(text: str) -> float:
    return datetime.fromisoformat(text.strip()).timestamp()


def _tokens(text: str) -> int:
    value = int(text)
    if not 0 <= value <= LARGEST_TOKENS:
        raise ValueError(text)
    return value


COLUMNS = ("seconds", "prompt_tokens", "response_tokens")
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
READERS: dict[tuple[str, str, str], Callable[[str], float]] = {COLUMNS: _number, AZURE: _moment}


def _recorded(path: Path) -> Iterator[Arrival]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            names = next(rows, [])
            columns = next((known for known in READERS if set(known) <= set(names)), None)
            if columns is None or len(set(names)) < len(names):
                raise SpecError(
                    f"{path.name} has the columns {', '.join(names[:8]) or '(none)'}",
                    f"a trace has {', '.join(COLUMNS)}, or {', '.join(AZURE)}, each once",
                )
            at = [names.index(name) for name in columns]
            for row in rows:
                yield _arrival(row, at, READERS[columns], len(names), f"{path.name}, line {rows.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"{path.name} cannot be read: {error}", "give a CSV in UTF-8") from error


def _arrival(row: list[str], at: list[int], when: Callable[[str], float], fields: int, where: str) -> Arrival:
    if len(row) != fields:
        raise SpecError(f"{where}: {len(row)} fields under {fields} names", "correct the row")
    try:
        seconds, prompt, response = row[at[0]], row[at[1]], row[at[2]]
        return Arrival(when(seconds), max(_tokens(prompt), 1), max(_tokens(response), 1))
    except ValueError as error:
        raise SpecError(f"{where}: {error}", "a time, and two whole numbers of tokens from 0") from error
