"""An iteration's responses: which prompts, how they are asked for, what comes back, and what it is worth.

Everything is a pure function of (seed, iteration) and the weights: nothing of it is stored for a resume.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from escala.contract.errors import DataError, StaleWeights, StateError
from escala.contract.records import write_json
from escala.rollouts.weights import WeightVersion
from escala.schema import PpoConfig
from escala.schema.rewards import RewardKind
from workloads.data.chat import ChatTokenizer
from workloads.data.dialogues import Prompt, prompt_of, read_lines
from workloads.data.examples import Draws
from workloads.generation.protocol import Completion, RequestFailed, SamplingParams
from workloads.rewards.scoring import make_reward, weighted_sums

T = TypeVar("T")

PROMPTS = "prompts.json"
OTHER_SEED = 1 << 62
SERVED = "served"  # the sum of the rewards that the service computes


@dataclass(frozen=True)
class PromptTokens:
    """A prompt, and the token ids that the policy continues."""

    prompt: Prompt
    tokens: list[int]


@dataclass(frozen=True)
class Response:
    """A response: number `number` of those to the prompt in place `slot` of the iteration, over all ranks."""

    slot: int
    number: int
    prompt: Prompt
    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    engine_logprobs: list[float]  # of the tokens, by the weights that drew them
    finished: bool  # it ended by itself
    version: int  # of those weights
    drafted: int = 0  # tokens, by the engine's speculation
    accepted: int = 0  # of these
    cpu_seconds: float = 0.0  # of the engine


class ServedResponse(Protocol):
    """A response as the service gives it (`workloads.serving.records`)."""

    @property
    def completion(self) -> Completion:
        """Its tokens."""
        ...

    @property
    def weights(self) -> WeightVersion:
        """The weights that drew it."""
        ...


class RolloutService(Protocol):
    """What is asked of the rollout service (`workloads.serving.client.Rollouts`)."""

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], min_version: int = 0
    ) -> Sequence[ServedResponse]:
        """A response to each prompt."""
        ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The served rewards' weighted sum."""
        ...

    def publish(self, state: Mapping[str, Tensor], version: int, *, timeout_seconds: float) -> object:
        """Make `state` the weights of every replica, as `version`."""
        ...


def read_prompts(path: Path, tokenizer: ChatTokenizer, most_tokens: int) -> list[PromptTokens]:
    """The prompts of a JSONL file, tokenised. One that is longer than `most_tokens` is left out, since
    cutting it would make another prompt, and so is one that the model's template refuses: which, and how many, is
    printed. Raises DataError where none is left.
    """
    found, fitting = 0, list[PromptTokens]()
    for where, record in read_lines(path):
        prompt, found = prompt_of(where, record), found + 1
        try:
            one = PromptTokens(prompt, tokenizer.prompt(prompt))
        except DataError as error:
            print(f"{where} is left out: {error.message}", flush=True)
            continue
        if 0 < len(one.tokens) <= most_tokens:
            fitting.append(one)
    print(
        f"{len(fitting)} prompts, {found - len(fitting)} refused, empty or longer than {most_tokens} tokens left out",
        flush=True,
    )
    if not fitting:
        raise DataError(
            f"No prompt of {path} has 1 to {most_tokens} tokens.",
            "Raise training.context_tokens, or lower sampling.max_response_tokens.",
        )
    return fitting


def save_prompts(prompts: Sequence[PromptTokens], directory: Path) -> None:
    """Write them into `directory`."""
    write_json(directory / PROMPTS, [asdict(one) for one in prompts])


def load_prompts(directory: Path) -> list[PromptTokens]:
    """Read them."""
    return [PromptTokens(**one) for one in json.loads((directory / PROMPTS).read_text())]


def request_seed(seed: int, iteration: int, slot: int, number: int) -> int:
    """Of one request's random numbers: 63 bits that follow from the run's seed and the request's place."""
    digest = hashlib.sha256(f"{seed}/{iteration}/{slot}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class RolloutSampler:
    """One rank's share of every iteration: the prompts in the slots rank, rank + ranks, ..., all their responses.

    Args:
        prompts: all of them, the same on every rank.
    """

    def __init__(self, config: PpoConfig, prompts: Sequence[PromptTokens], rank: int, ranks: int) -> None:
        self.config, self.prompts, self.rank, self.ranks = config, prompts, rank, ranks
        self._order = Draws(len(prompts), config.batch.prompts, config.training.seed)

    def requests(self, iteration: int) -> list[tuple[int, int, PromptTokens, SamplingParams]]:
        """(slot, number, prompt, parameters) of each response."""
        config = self.config
        chosen = list(enumerate(self._order.step(iteration)))[self.rank :: self.ranks]
        return [
            (slot, number, self.prompts[prompt], self._params(iteration, slot, number))
            for slot, prompt in chosen
            for number in range(config.batch.responses_per_prompt)
        ]

    def _params(self, iteration: int, slot: int, number: int) -> SamplingParams:
        sampling = self.config.sampling
        return SamplingParams(
            max_tokens=sampling.max_response_tokens,
            temperature=sampling.temperature,
            seed=request_seed(self.config.training.seed, iteration, slot, number),
        )

    def draw(self, service: RolloutService, iteration: int, version: int) -> list[Response]:
        """This rank's responses of `iteration`, by weights of `version`.

        Raises StaleWeights for a response of other weights, StateError where the service does not answer in time, and
        what the service raises.
        """
        requests = self.requests(iteration)
        tokens, params = [one.tokens for _, _, one, _ in requests], [p for *_, p in requests]
        answers = ask(service, tokens, params, version)
        found = []
        for (slot, number, one, _), answer in zip(requests, answers, strict=True):
            if answer.weights.version != version:
                raise StaleWeights(
                    f"A response is of version {answer.weights.version}, and {version} was asked for.",
                    "Only this job may publish to its rollout service.",
                )
            done = answer.completion
            found.append(
                Response(
                    slot,
                    number,
                    one.prompt,
                    one.tokens,
                    list(done.token_ids),
                    done.text,
                    list(done.logprobs),
                    done.finish_reason == "stop",
                    version,
                    done.drafted,
                    done.accepted,
                    done.cpu_seconds,
                )
            )
        return found


def ask(
    service: RolloutService, prompts: Sequence[list[int]], params: Sequence[SamplingParams], version: int
) -> list[ServedResponse]:
    """A response to each prompt. One that failed by itself is asked for again with another seed, one time; the others
    stay as they are, for they depend on nothing but themselves. Raises as `RolloutSampler.draw`.
    """
    try:
        return list(timely(lambda: service.generate(prompts, params, min_version=version), "responses"))
    except RequestFailed as error:
        if len(prompts) > 1:
            half = len(prompts) // 2
            first = ask(service, prompts[:half], params[:half], version)
            return first + ask(service, prompts[half:], params[half:], version)
        print(f"a response is drawn again with another seed: {error.message}", flush=True)
    again = [replace(params[0], seed=params[0].seed ^ OTHER_SEED)]
    return list(timely(lambda: service.generate(prompts, again, min_version=version), "responses"))


@dataclass(frozen=True)
class Scores:
    """What responses are worth: their weighted sums, and what these are made of by name, before weights."""

    sums: list[float]
    parts: dict[str, list[float]]


class Scoring:
    """The rewards of a run: some here, by their names; those that are served by the service, as its weighted sum."""

    def __init__(self, config: PpoConfig) -> None:
        here = [one for one in config.rewards if not one.is_served]
        self._seconds = config.rollouts.timeout_seconds
        self._here = {one.column: make_reward(one, timeout_seconds=self._seconds) for one in here}
        self._weights = {one.column: one.weight for one in here}
        self._weights[SERVED] = 1.0  # the service has weighted what it sums
        self._served = bool(served_rewards(config))

    def score(self, service: RolloutService, responses: Sequence[Response]) -> Scores:
        """Of each response. Raises SpecError or DataError, as the rewards do; StateError for one of them or a service
        that is late.
        """
        deadline = time.monotonic() + self._seconds  # of all rewards that are computed here
        prompts, texts = [one.prompt for one in responses], [one.text for one in responses]
        parts = {
            name: reward.score(prompts, texts, max(0.0, deadline - time.monotonic()))
            for name, reward in self._here.items()
        }
        if self._served:
            parts[SERVED] = timely(lambda: service.score(prompts, texts), "rewards")
        return Scores(weighted_sums([(self._weights[name], column) for name, column in parts.items()]), parts)


def served_rewards(config: PpoConfig) -> list[RewardKind]:
    """The sections that the `reward` deployment computes."""
    return [one for one in config.rewards if one.is_served]


def timely(ask: Callable[[], T], what: str) -> T:
    """The answer of `ask`. Raises StateError for one that is late."""
    try:
        return ask()
    except TimeoutError as error:
        raise StateError(
            f"The rollout service did not give its {what} in time.",
            "Raise rollouts.timeout_seconds, or give it more replicas; then `escala jobs retry`.",
        ) from error
