"""What a generation engine takes and gives: requests, outputs, and the `EngineProtocol` that deployments stand on.

An engine is driven from one thread: `add` and `cancel` between steps, `step` in a loop while `has_work`. It knows
nothing of Ray, HTTP or time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, Protocol

from escala.contract.errors import EscalaError, SpecError, StateError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""stop: a stop token or string, or end of text; length: `max_tokens`; cancelled: `cancel`; error: `Output.error`."""

# Sampling computes in fp32: smaller divisors flush to 0, greater numbers are infinite.
FP32_TINY, FP32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127
INT64_MAX = 2**63 - 1
# Every new token is searched for every one of them, by the one thread that steps the engine.
STOP_STRINGS, STOP_CHARACTERS, STOP_TOKENS = 64, 1024, 1024


class EngineStopped(StateError):
    """The engine has died or was closed: the request may be right, and another replica can be asked."""


class RequestFailed(EscalaError):
    """Something failed while one request was served: an error of ours, which ended that request alone."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    Filters apply in this order, each to what the one before left: repetition penalty, temperature, top-k, top-p,
    min-p. Equal prompt, equal parameters (seed included), equal weights: equal tokens, whatever else is in the batch.

    Args:
        max_tokens: tokens to generate at most, the stop token included.
        temperature: the logits are divided by it, in fp32; 0: the most probable token (the lowest id among equals).
            One that leaves no finite distribution of some step's logits ends the request with an error.
        top_k: keep the k most probable tokens (those equal to the k-th too); 0: all.
        top_p: keep the fewest most probable tokens whose probabilities sum to at least this (Holtzman et al. 2020).
        min_p: drop tokens less probable than this share of the most probable one (Nguyen et al. 2024).
        repetition_penalty: logits of tokens in prompt or response are divided by it where positive, multiplied where
            negative (Keskar et al. 2019).
        stop_token_ids: end after one of these, STOP_TOKENS at most; it is part of the response's tokens, not of its
            text.
        stop: end before one of these strings, STOP_STRINGS of STOP_CHARACTERS at most, wherever token borders fall;
            the text ends before the string, the tokens with the one that completed it. One that spells a special
            token ends at the token.
        seed: of this request's own random numbers, 0 to 2^63 - 1: a client that wants different samples of one
            prompt gives different seeds.
        ignore_eos: go on after every token that ends an answer by the model's files and template.

    Raises SpecError where a value is out of range, or of another type.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1)
        _whole("top_k", self.top_k, 0)
        _whole("seed", self.seed, 0)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            _check(name, getattr(self, name), _is(getattr(self, name), Real), "a number")
        hot, penalty = self.temperature, self.repetition_penalty
        _check("temperature", hot, hot == 0 or FP32_TINY <= hot <= FP32_MAX, f"0, or {_FP32}")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p < 1, "0 or more, below 1")
        _check("repetition_penalty", penalty, FP32_TINY <= penalty <= FP32_MAX, _FP32)
        self._check_stops()

    def _check_stops(self) -> None:
        stop, ids = self.stop, self.stop_token_ids
        listed = all(isinstance(each, (tuple, list)) for each in (stop, ids))
        _check("stop", stop, listed and all(isinstance(s, str) and s for s in stop), "non-empty strings")
        short = len(stop) <= STOP_STRINGS and all(len(s) <= STOP_CHARACTERS for s in stop)
        _check("stop", stop, short, f"{STOP_STRINGS} strings of {STOP_CHARACTERS} characters at most")
        _check("stop_token_ids", ids, len(ids) <= STOP_TOKENS, f"{STOP_TOKENS} tokens at most")


_FP32 = f"{FP32_TINY:.2g} to {FP32_MAX:.2g}: it is computed in fp32"


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _whole(name: str, value: int, least: int) -> None:
    good = _is(value, Integral) and least <= value <= INT64_MAX
    _check(name, value, good, f"a whole number from {least} to 2^63 - 1")


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise SpecError(f"Sampling parameter {name} is {shown(value)}.", f"Make it {wanted}.")


def shown(value: object) -> str:
    """`value` in a message: short, whatever a client has sent."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (tuple, list)) and len(value) > 3:
        return f"{len(value)} items"
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 100 else f"{text[:100]}..."


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `id` is the caller's and unique among the engine's unfinished requests."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Output:
    """What one step added to one request.

    Attributes:
        token_ids: the new tokens.
        logprobs: of each, under softmax(logits / temperature) over the whole vocabulary, before repetition penalty
            and filters (temperature 1 where it is 0): what a learner recomputes for its importance ratio
            (docs/theory C.3).
        text: the new text. Text that may yet turn into a stop string, or half a character, is held back until it
            is decided; nothing is held back after the last output. Empty without a tokenizer.
        finish_reason: None while the request goes on.
        weights_version: of the weights that computed all of this request's tokens.
        drafted: tokens that were drafted for it in this step (docs/theory A.9); those accepted are all of `token_ids`
            but the last one.
        cpu_seconds: its share of what the steps took of the stepping thread.
        error: what ended this request, and no other one, where the reason is error: SpecError where its parameters
            leave nothing to draw from, RequestFailed for anything else.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason | None
    weights_version: int
    error: EscalaError | None = None
    drafted: int = field(default=0, compare=False)
    cpu_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Completion:
    """A whole response: the outputs of one request put together.

    Attributes:
        drafted, accepted: tokens that were drafted for it, and those of them that are in it.
        cpu_seconds: its share of what the engine's steps took of their thread.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    weights_version: int
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)
    cpu_seconds: float = field(default=0.0, compare=False)


def completion_of(outputs: Sequence[Output]) -> Completion:
    """A request's outputs, from the first to the last, put together. Raises the error that ended it, if one did;
    EscalaError where they have no end.
    """
    last = outputs[-1] if outputs else None
    if last is not None and last.error is not None:
        raise last.error
    if last is None or last.finish_reason is None:
        raise EscalaError("A response's outputs have no end.", "Please report it.")
    return Completion(
        tuple(token for o in outputs for token in o.token_ids),
        tuple(logprob for o in outputs for logprob in o.logprobs),
        "".join(o.text for o in outputs),
        last.finish_reason,
        last.weights_version,
        sum(o.drafted for o in outputs),
        sum(max(0, len(o.token_ids) - 1) for o in outputs),
        sum(o.cpu_seconds for o in outputs),
    )


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, and what it holds now.

    Attributes:
        waiting, running: requests not admitted yet (or preempted), and admitted.
        started: unfinished requests that hold tokens or blocks of the present weights.
        queued_tokens: tokens that the unfinished requests may still cost: prompts to be read and responses up to
            their max_tokens.
        free_blocks, total_blocks: of the KV cache; a block that only the prefix cache keeps counts as free.
        prompt_tokens: read so far, recomputed ones included, those found in the prefix cache not.
        cached_prompt_tokens: found in the prefix cache.
        generated_tokens, finished, preemptions, steps: so far.
        drafted_tokens, accepted_tokens: drafts that were scored, and those of them that became tokens.
        step_seconds, cpu_seconds: inside `step`, wall time, and that of the thread that steps.
        weight_bytes: that the weights hold in memory, as they are laid out to be multiplied by.
    """

    waiting: int
    running: int
    started: int
    queued_tokens: int
    free_blocks: int
    total_blocks: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    finished: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    steps: int
    step_seconds: float
    cpu_seconds: float
    weight_bytes: int


class EngineTokenizer(Protocol):
    """What an engine reads of a tokenizer: texts and chats have one each (`workloads.data`)."""

    @property
    def tokenizer(self) -> Tokenizer:
        """As it is in its file."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ...


class EngineProtocol(Protocol):
    """A continuous-batching engine."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything: requests wait or run, or a cancellation is to be reported."""
        ...

    @property
    def weights_version(self) -> int:
        """The number last given to `load_weights` or `set_capacity_factor`; 0 before."""
        ...

    @property
    def capacity_factor(self) -> float | None:
        """By which a mixture's experts have places in each request (docs/theory B.5); None: nothing is dropped."""
        ...

    @property
    def kernels(self) -> str:
        """Which kernels multiply, as text: an engine that is told them gives the same bits, or refuses."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Prompt and response together may not be longer."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises SpecError where it can never run: an empty prompt, a token id outside the vocabulary, more tokens than
        the context or the whole cache holds, stop strings without a tokenizer, an id in use.
        """
        ...

    def cancel(self, request_id: str) -> bool:
        """End a request: the next `step` reports it with "cancelled". False where it is unknown or has ended."""
        ...

    def step(self, admit: bool = True) -> list[Output]:
        """One iteration: admit, read a piece of prompts, one token or more for every running request whose prompt is
        read. An error has an output of its own, after that of the tokens before it.

        Args:
            admit: False: start no request that has not started yet. To drain before `load_weights`, step with
                False until `stats().started` is 0.
        """
        ...

    def stats(self) -> EngineStats:
        """What the engine holds and has done."""
        ...

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Copy `state` (the model's own names and shapes, any float dtype) over the weights, between two steps.

        The prefix cache is emptied: keys and values of old weights never meet new ones. Requests that have not
        started stay queued and run on the new weights.

        Raises StateError, with nothing changed, while any request has started (a response is of one version: drain
        first); CheckpointError, with nothing changed, where names or shapes differ.
        """
        ...

    def limit_running(self, requests: int) -> None:
        """Admit no request while as many run, 1 or more, its own most at the most; those that run go on."""
        ...

    def check_capacity_factor(self, factor: float | None) -> None:
        """Raise SpecError where a capacity factor cannot be had: the model is dense, the number is not above 0 or not
        finite, or tokens are drafted, which would take places. None can always be had.
        """
        ...

    def set_capacity_factor(self, factor: float | None, version: int) -> None:
        """Serve the same weights at another capacity factor, as `version`, between two steps; None: nothing is dropped.

        The prefix cache is emptied; requests that have not started run at the new one.

        Raises StateError, with nothing changed, while any request has started; SpecError as `check_capacity_factor`.
        """
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Completions of prompts, in order. One `params` for all, or one each. Raises as `add`."""
        ...
