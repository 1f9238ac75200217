"""Hostile requests and clients that leave, against the rollout service's real HTTP app, replica and engine.

    python benchmarks/fuzz_requests.py [--requests 2000] [--rounds 10] [--seed 0]

All in one process, Ray and Serve left out (`tests/unit/local_service.py`), a tiny random model. fuzz: requests whose
fields hold numbers at the limits of fp32 and int64, other types, neutral values, damaged JSON, odd headers, some of
whose clients leave; beside them always one and the same well-formed request. Floors: no answer 5xx, none that does not
come, every neighbour's tokens and log-probabilities equal to the last bit, no block of the cache leaked. cancellations:
64 streams in each round, each client may leave at a random moment; who stayed is answered whole, and afterwards nothing
runs, waits or is queued and all blocks are free. Exit code 1 where a floor is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.unit.local_service import Answer, ask, chat_tokenizer, local_service, quiet
from workloads.generation.protocol import SamplingParams
from workloads.serving.policy import Policy

HANG_SECONDS = 60.0
TOGETHER, NEIGHBOURS = 12, 3
STREAMS = 64
OURS = ("InternalError", "RequestFailed", "EngineStopped", "StateError")
INTEGERS = (0, 1, -1, 7, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 2, 2**63 - 1, 2**63, 2**64, -(2**63))
FLOATS = (
    *(0.0, -0.0, 1e-46, 1e-45, 1.5e-45, 1e-40, 1.17e-38, 1.18e-38, 1e-37, 1e-30, 1e-8, 0.3, 0.999, 1.0),
    *(1 + 1e-9, 1.5, 2.0, 1e8, 1e30, 3.4e38, 3.5e38, 1e308, 5e-324, 1e-320, -1.0, float("nan"), float("inf")),
)
OTHERS = (
    None,
    True,
    False,
    "",
    "1",
    "auto",
    "none",
    [],
    {},
    [[]],
    [None],
    {"type": "text"},
    "é😀",
    [1],
    ["a"],
)
REALS = ("temperature", "top_p", "min_p", "repetition_penalty")
WHOLE = ("top_k", "seed", "n", "max_tokens", "logprobs", "min_version", "max_staleness")
NEUTRALS = ("presence_penalty", "frequency_penalty", "best_of", "top_logprobs")
ANYTHING = (
    *(
        "stop",
        "stop_token_ids",
        "stream_options",
        "user",
        "logit_bias",
        "tools",
        "tool_choice",
        "echo",
        "model",
    ),
    *("response_format", "parallel_tool_calls", "metadata", "store", "service_tier", "suffix", "ignore_eos"),
    *("functions", "modalities", "max_completion_tokens", "messages", "prompt", "unheard_of", "stream"),
)
PROMPTS: tuple[Any, ...] = (
    *("the cat", "", "é😀\u0000", "<|endoftext|>", "a" * 5000, "the cat " * 60, [1, 2, 3], [], [[1], [2, 3]]),
    *(
        ["a", "b"],
        [319],
        [320],
        [-1],
        [2**63],
        [2**64],
        [10**30],
        [1.5],
        [True],
        [[1], "a"],
        [5] * 255,
        [5] * 257,
    ),
    {"a": 1},
)
NEIGHBOUR = {
    "prompt": [5, 6, 7, 8],
    "max_tokens": 24,
    "seed": 11,
    "logprobs": 0,
    "ignore_eos": True,
    "temperature": 0.8,
}


@dataclass
class Found:
    """What a run of `fuzz` saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    left: int = 0
    neighbours: int = 0
    slowest_seconds: float = 0.0


def number(rng: random.Random, whole: bool) -> Any:
    """One at a limit, mostly of the kind that is wanted."""
    kind = rng.random()
    if kind < 0.1:
        return rng.choice((10**30, -(10**30), 10**400, 1e400, 10**4000))
    if (kind < 0.9) == whole:
        return rng.choice(INTEGERS) + rng.choice((0, 0, 0, -1, 1))
    return rng.choice(FLOATS)


def request(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """A path, a body and headers."""
    path = rng.choice(["/v1/completions"] * 5 + ["/v1/chat/completions"] * 3 + ["/score", "/compare"])
    body: dict[str, Any] = {"max_tokens": rng.choice((1, 3, 8)), "stream": rng.random() < 0.3}
    if path == "/v1/completions":
        body["prompt"] = (
            rng.choice(PROMPTS) if rng.random() < 0.25 else [rng.randrange(320) for _ in range(9)]
        )
    elif path == "/v1/chat/completions":
        content = rng.choice(PROMPTS) if rng.random() < 0.2 else rng.choice(("hello", "é😀", "<|endoftext|>"))
        body["messages"] = [{"role": rng.choice(("user", "user", "system", "x y", "")), "content": content}]
    else:
        names = ("prompts", "responses") if path == "/score" else ("prompts", "first", "second")
        body = {name: ["a"] * rng.choice((0, 1, 2, 2)) for name in names}
        return path, _damaged(rng, _text(body)), _headers(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        name, kind = rng.choice(3 * (REALS + WHOLE) + NEUTRALS), rng.random()
        if kind < 0.75:
            body[name] = number(rng, name in WHOLE)
        else:
            body[name if kind < 0.8 else rng.choice(ANYTHING)] = rng.choice(OTHERS)
    return path, _damaged(rng, _text(body)), _headers(rng)


def _text(body: Any) -> bytes:
    """JSON, with the numbers that `json` writes as Infinity as they may be written, too."""
    return json.dumps(body).replace("Infinity", "1e999").encode()


def _damaged(rng: random.Random, text: bytes) -> bytes:
    kind = rng.random()
    if kind > 0.08:
        return text
    if kind < 0.02:
        return text[: rng.randrange(len(text))]
    if kind < 0.04:
        return b"[" * rng.choice((10, 300, 100_000)) + text
    at = rng.randrange(len(text))
    return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]


def _headers(rng: random.Random) -> dict[str, str]:
    if rng.random() > 0.05:
        return {}
    odd = (("content_type", "text/plain"), ("origin", "http://evil.example"), ("host", "evil.example"))
    return dict([rng.choice((*odd, ("content_length", "9" * 30), ("sec_fetch_site", "cross-site")))])


def problem(answer: Answer) -> str | None:
    """What is wrong with an answer, if anything."""
    if answer.status >= 500 or answer.status == 0:
        return f"status {answer.status}: {answer.text[:300]}"
    if "event-stream" not in answer.headers.get("content-type", ""):
        found = answer.json()
        return (
            None if answer.status == 200 or found["error"]["message"] else f"no message: {answer.text[:300]}"
        )
    last = answer.events()[-1]
    error = last.get("error") if isinstance(last, dict) else None
    if last == "[DONE]" or (error and error["type"] not in OURS):
        return None
    return f"a stream that ended with {last}"


async def _one(rng: random.Random, found: Found, gate: asyncio.Semaphore) -> None:
    path, body, headers = request(rng)
    leaves = rng.random() < 0.1 and rng.random() * 0.05
    async with gate:
        started = time.monotonic()
        try:
            async with asyncio.timeout(leaves or HANG_SECONDS):
                answer = await ask(path, body, **headers)
        except TimeoutError:
            found.left += bool(leaves)
            if not leaves:
                found.wrong.append(f"no answer within {HANG_SECONDS} s: {path} {body[:300]!r}")
            return
    found.slowest_seconds = max(found.slowest_seconds, time.monotonic() - started)
    found.statuses[answer.status] += 1
    wrong = problem(answer)
    if wrong:
        found.wrong.append(f"{wrong} to {path} {body[:300]!r}")


async def fuzz(directory: Path, count: int, seed: int) -> Found:
    """`count` hostile requests, `TOGETHER` at a time."""
    found, gate, done = Found(), asyncio.Semaphore(TOGETHER), asyncio.Event()
    async with local_service(chat_tokenizer(directory), reward=Reward()) as policy:
        alone = (await ask("/v1/completions", NEIGHBOUR)).json()["choices"]

        async def neighbour() -> None:
            while not done.is_set():
                answer = (await ask("/v1/completions", NEIGHBOUR)).json()
                found.neighbours += 1
                if answer.get("choices") != alone:
                    found.wrong.append(f"a neighbour's answer changed: {answer}")

        beside = [asyncio.create_task(neighbour()) for _ in range(NEIGHBOURS)]
        await asyncio.gather(*(_one(random.Random(f"{seed}/{i}"), found, gate) for i in range(count)))
        done.set()
        await asyncio.gather(*beside)
        await quiet(policy)
        policy.stepper.check()
    return found


class Reward:
    """Of the `reward` deployment."""

    async def score(self, prompts: list[Any], responses: list[str]) -> list[float]:
        return [0.5] * len(responses)


async def cancellations(directory: Path, rounds: int, seed: int, tokens: int = 40) -> tuple[int, int]:
    """(streams that stayed, streams that left) of `rounds` rounds. Raises AssertionError where a floor is missed."""
    rng, stayed, left = random.Random(seed), 0, 0
    async with local_service(chat_tokenizer(directory), cache_tokens=1024) as policy:
        params = [SamplingParams(max_tokens=tokens, seed=i, ignore_eos=True) for i in range(STREAMS)]
        prompts = [[i % 300 + 1, 2, 3] * (i % 9 + 1) for i in range(STREAMS)]
        wanted = [
            (await policy.stepper.complete(p, q)).token_ids for p, q in zip(prompts, params, strict=True)
        ]
        for _ in range(rounds):
            streams = [
                asyncio.create_task(_stream(policy, *each)) for each in zip(prompts, params, strict=True)
            ]
            leaving = [i for i in range(STREAMS) if rng.random() < 0.4]
            waits = {
                i: rng.choice((0.0, 0.0, rng.random() * 0.002, rng.random() * tokens / 80)) for i in leaving
            }

            async def leave(i: int, after: float, tasks: list[asyncio.Task[Any]]) -> None:
                if after:
                    await asyncio.sleep(after)
                tasks[i].cancel()

            await asyncio.gather(*(leave(i, after, streams) for i, after in waits.items()))
            answers = await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), HANG_SECONDS)
            for i, answer in enumerate(answers):
                cancelled = i in waits and isinstance(answer, asyncio.CancelledError)
                assert cancelled or answer == wanted[i], (i, answer)
                left, stayed = left + cancelled, stayed + (not cancelled)
            await quiet(policy)
            policy.stepper.check()
    return stayed, left


async def _stream(policy: Policy, prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    return tuple([token async for piece in policy.stream(prompt, params) for token in piece.output.token_ids])


def main() -> int:
    """Exit code 1 where a floor is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = asyncio.run(fuzz(Path(directory), options.requests, options.seed))
        print(
            f"fuzz, seed {options.seed}: {options.requests} requests, {dict(sorted(found.statuses.items()))}"
        )
        print(
            f"  {found.left} left; slowest {found.slowest_seconds:.1f} s; {found.neighbours} neighbours bit-equal"
        )
        for wrong in found.wrong:
            print(f"  WRONG: {wrong}")
        stayed, left = asyncio.run(cancellations(Path(directory), options.rounds, options.seed))
        print(
            f"cancellations: {options.rounds} rounds of {STREAMS}: {stayed} answered whole, {left} left, 0 failed"
        )
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main())
