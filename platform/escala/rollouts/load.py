"""Requests to a running rollout service over HTTP, and how long each took: what a step test and a benchmark send."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from escala import http_client
from escala.contract.errors import ClusterError
from escala.rollouts.traces import Arrival

ANSWER_SECONDS = 600.0
LEAST_TOKEN, MOST_TOKEN = 3, 250  # ids that every vocabulary has


@dataclass(frozen=True)
class Answered:
    """One request: when it was sent and answered (seconds of `time.monotonic`), its tokens; `error`: why it failed."""

    sent: float
    done: float
    response_tokens: int
    error: str | None = None

    @property
    def seconds(self) -> float:
        """That it took."""
        return self.done - self.sent


@dataclass(frozen=True)
class Service:
    """Where to ask, and for which model."""

    address: str
    model: str
    token: str | None = None

    def ask(self, prompt_tokens: int, response_tokens: int, seed: int) -> Answered:
        """One response of exactly so many tokens to a random prompt. Does not raise: the answer says what failed."""
        draw = random.Random(seed)
        payload = {
            "model": self.model,
            "prompt": [draw.randint(LEAST_TOKEN, MOST_TOKEN) for _ in range(prompt_tokens)],
            "max_tokens": response_tokens,
            "ignore_eos": True,
            "seed": seed,
        }
        sent = time.monotonic()
        try:
            answer = http_client.request(
                f"{self.address}/v1/completions",
                method="POST",
                token=self.token,
                payload=payload,
                timeout_seconds=ANSWER_SECONDS,
            )
        except OSError as error:
            return Answered(sent, time.monotonic(), 0, str(error))
        done = time.monotonic()
        if not answer.succeeded:
            return Answered(sent, done, 0, answer.text[:300])
        return Answered(sent, done, int(answer.json()["usage"]["completion_tokens"]))


def play(service: Service, trace: Sequence[Arrival], on_answer: Callable[[Answered], None]) -> None:
    """Send the trace's requests when they are due, and wait for all answers; `on_answer` is called from any thread."""
    begun = time.monotonic()
    stop = threading.Event()  # waits without a sleep; nobody sets it

    def one(number: int, arrival: Arrival) -> None:
        on_answer(service.ask(arrival.prompt_tokens, arrival.response_tokens, number))

    with ThreadPoolExecutor(min(len(trace), 512)) as pool:
        for number, arrival in enumerate(trace):
            stop.wait(max(begun + arrival.seconds - time.monotonic(), 0.0))
            pool.submit(one, number, arrival)


@contextmanager
def clients(
    service: Service, count: int, prompt_tokens: int, response_tokens: int
) -> Iterator[list[Answered]]:
    """So many clients, each of which asks again as soon as it is answered; the answers so far. Raises ClusterError
    afterwards where a request failed.
    """
    answers: list[Answered] = []
    stop = threading.Event()

    def client(number: int) -> None:
        asked = 0
        while not stop.is_set():
            answers.append(service.ask(prompt_tokens, response_tokens, number + count * asked))
            asked += 1
            if answers[-1].error is not None:
                return

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    failed = next((a.error for a in answers if a.error is not None), None)
    if failed is not None:
        raise ClusterError(f"a request of the test failed: {failed}", "`escala rollouts status`")
