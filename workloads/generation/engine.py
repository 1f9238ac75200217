"""The engine: continuous batching over a paged cache (Yu et al. 2022; Kwon et al. 2023), in one process.

Same prompt, same parameters, same weights: same tokens, bit for bit, whatever else runs, is preempted or shares a
prefix. On CPU with oneDNN and one thread this holds because every sum is taken in an order that depends on the
request and on `block_tokens` alone (see `linear`, `attention`, `scheduler`); tests compare the bits. On CUDA, and
without oneDNN, the batch's size may move a logit's last bits, and with them a draw that lies as near to its border.

Drafted tokens (`speculation`; docs/theory A.9) are rows of the pass that scores them, as a preempted response's tokens
are when they are computed again: so they change what a step costs, and no bit of what it gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from escala.contract.errors import EscalaError, SpecError, StateError
from workloads.generation.drawing import Drawn, Place, draw_tokens, failed
from workloads.generation.kernel_choice import EngineLimits, KernelTiming
from workloads.generation.network import Network, Smaller, TokenSpan
from workloads.generation.protocol import (
    Completion,
    EngineStats,
    EngineTokenizer,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    completion_of,
    shown,
)
from workloads.generation.scheduler import NO_DRAFTS, Scheduler, Sequence, Work
from workloads.generation.speculation.speculator import Speculator
from workloads.generation.text import TextStream
from workloads.model.transformer import Transformer

CACHE_BYTES, BLOCK_TOKENS = 1 << 30, 32


class Engine:
    """`EngineProtocol` for a `Transformer`. Not thread-safe.

    Args:
        model: on its device and in its dtype. The engine makes it its own: no gradients, and `load_weights` writes it.
        tokenizer: None: no text, no end of text, no stop strings.
        max_running: requests in a batch.
        cache_tokens: positions that the cache holds, in whole blocks. None: `max_running` whole contexts, or what
            attention needs of them, or what fits into CACHE_BYTES.
        block_tokens: positions of a block. None: those of the model's attention, or BLOCK_TOKENS.
        prefill_tokens: of prompts in one step, in whole blocks: more is faster, and delays running requests longer.
        threads: torch's CPU threads, set for this process. None: left alone.
        speculation: what drafts tokens, if anything does.
        kernels: which kernels multiply, as text: those of an engine whose bits these shall be. MEASURED: the fastest
            here for these limits. None: the first that can, unmeasured.
        smaller: how matrices in full precision are stored, of these weights and of later ones. None: they stay.
        capacity_factor: of a mixture's experts, in each request over its own positions (docs/theory B.5); prefixes are
            then not shared. None: the model's own, mostly none dropped.

    Raises SpecError where the cache cannot hold a block, or attention can't have blocks of this size; where a choice of
    kernels cannot be followed here; where the matrices cannot be stored so; for a capacity factor that
    `check_capacity_factor` refuses.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: EngineTokenizer | None,
        *,
        max_running: int = 32,
        cache_tokens: int | None = None,
        block_tokens: int | None = None,
        prefill_tokens: int = 256,
        threads: int | None = 1,
        speculation: Speculator | None = None,
        kernels: str | None = None,
        smaller: Smaller | None = None,
        capacity_factor: float | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        limits = EngineLimits(max_running, prefill_tokens)
        self._network = Network(model, kernels=kernels, limits=limits, smaller=smaller)
        config = model.config
        self._tokenizer = tokenizer
        self._ends = frozenset(() if tokenizer is None else tokenizer.end_ids)
        attention, item = config.attention, self._network.like.element_size()
        block_tokens = block_tokens or attention.block_tokens(config) or BLOCK_TOKENS
        block_bytes = attention.block_bytes(config, block_tokens, item)
        live = attention.live_blocks(config, block_tokens)
        if cache_tokens is None:
            each = -(-config.max_context_tokens // block_tokens)
            whole = max_running * each
            if live is not None:  # and one piece of a prompt
                whole = min(whole, max_running * live + prefill_tokens // block_tokens)
            blocks = min(whole, CACHE_BYTES // block_bytes)
        else:
            blocks = cache_tokens // block_tokens
        if blocks < 1 or max_running < 1:
            raise SpecError(
                f"An engine of {max_running} requests with a cache of {blocks} blocks of {block_tokens} tokens, "
                f"{block_bytes} bytes each, cannot run.",
                "Raise max_running and cache_tokens, or lower block_tokens.",
            )
        self._speculation = speculation
        if capacity_factor is None and config.moe is not None:
            capacity_factor = config.moe.evaluation_capacity_factor
        self.check_capacity_factor(capacity_factor)
        on_cpu = self._network.like.device.type == "cpu"
        self._clock = time.thread_time if on_cpu else time.perf_counter
        self._scheduler = Scheduler(blocks, block_tokens, max_running, prefill_tokens, live)
        self.cache = self._network.decode_state(blocks, block_tokens)
        self._count(capacity_factor)
        self._sequences: dict[str, Sequence] = {}
        self._cancelled: list[Output] = []
        self._version = 0
        self._prompt_tokens = self._generated = self._finished = self._steps = self._drafted = (
            self._accepted
        ) = 0
        self._seconds = self._cpu_seconds = self._shared_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._sequences or self._cancelled)

    @property
    def weights_version(self) -> int:
        """The number last given to `load_weights` or `set_capacity_factor`; 0 before."""
        return self._version

    @property
    def capacity_factor(self) -> float | None:
        """See EngineProtocol."""
        return self._capacity_factor

    @property
    def kernels(self) -> str:
        """Which kernels multiply, as text (see `kernel_choice`)."""
        return self._network.kernels

    @property
    def timings(self) -> Many[KernelTiming]:
        """What the kernels were chosen by, where they were measured."""
        return self._network.timings

    @property
    def max_context_tokens(self) -> int:
        """Prompt and response together may not be longer."""
        return self._network.config.max_context_tokens

    def add(self, request: Request) -> None:
        """See EngineProtocol."""
        self._check(request)
        sequence = self._scheduler.add(request, self._stream(request))
        self._sequences[request.id] = sequence
        if self._speculation is not None:
            self._speculation.begin(sequence)

    def _stream(self, request: Request) -> TextStream | None:
        if self._tokenizer is None:
            return None
        try:
            return TextStream(self._tokenizer.tokenizer, request.params.stop, continues=True)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # as in `_advance`
            raise failed(request.id, error) from error

    def cancel(self, request_id: str) -> bool:
        """See EngineProtocol."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._cancelled.append(self._leave(sequence))
        return True

    def step(self, admit: bool = True) -> list[Output]:
        """See EngineProtocol."""
        started, cpu = time.perf_counter(), time.thread_time()
        outputs, self._cancelled = self._cancelled, []
        drafts, began = NO_DRAFTS, self._clock()
        if self._speculation is not None:
            drafts = self._speculation.drafts(self._scheduler.decoding, self._scheduler.reads_prompts)
            self._speculation.drafted(self._clock() - began)
        drafted = self._clock()
        tiles, rows = self._scheduler.plan(admit, drafts)
        if tiles or rows:
            outputs += self._compute(tiles, rows, cpu)
        if self._speculation is not None and rows and not tiles:
            count = sum(w.end - w.start + len(w.draft) for w in rows)
            self._speculation.measured(count, self._clock() - drafted)
        self._steps += 1
        self._seconds += time.perf_counter() - started
        self._cpu_seconds += time.thread_time() - cpu
        return outputs

    def stats(self) -> EngineStats:
        """See EngineProtocol."""
        scheduler, sequences = self._scheduler, self._sequences.values()
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            started=sum(bool(s.table or s.generated) for s in sequences),
            queued_tokens=sum(s.prompt_length + s.request.params.max_tokens - s.generated for s in sequences)
            - sum(min(s.computed, s.prompt_length) for s in sequences),
            free_blocks=scheduler.pool.free,
            total_blocks=scheduler.pool.total,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=scheduler.cached_tokens,
            generated_tokens=self._generated,
            finished=self._finished,
            preemptions=scheduler.preemptions,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            steps=self._steps,
            step_seconds=self._seconds,
            cpu_seconds=self._cpu_seconds,
            weight_bytes=self._network.weight_bytes,
        )

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """See EngineProtocol."""
        self._check_nothing_has_started()
        self._network.load(state)
        self._begin_version(version)

    def check_capacity_factor(self, factor: float | None) -> None:
        """See EngineProtocol."""
        if factor is None:
            return
        if self._network.config.moe is None:
            raise SpecError(
                f"A dense model has no experts to limit by capacity factor {factor:g}.", "Leave it out."
            )
        if not (math.isfinite(factor) and factor > 0):
            raise SpecError(f"Capacity factor {factor} is out of range.", "Give a number above 0, or none.")
        if self._speculation is not None:
            raise SpecError(
                f"Speculation can't serve a mixture that drops tokens in generation (capacity factor {factor:g}): "
                "drafted tokens would take places of the others.",
                "Leave engine.speculation out, or serve a mixture without that factor.",
            )

    def set_capacity_factor(self, factor: float | None, version: int) -> None:
        """See EngineProtocol."""
        self.check_capacity_factor(factor)
        self._check_nothing_has_started()
        self._count(factor)
        self._begin_version(version)

    def _check_nothing_has_started(self) -> None:
        started = self.stats().started
        if started:
            raise StateError(
                f"{started} requests have begun under weights {self._version}: a response is of one version.",
                "Call step(admit=False) until stats().started is 0, or cancel them.",
            )

    def _begin_version(self, version: int) -> None:
        self._scheduler.pool.clear()
        self._version = version

    def limit_running(self, requests: int) -> None:
        """See EngineProtocol."""
        self._scheduler.limit = min(max(requests, 1), self._scheduler.max_running)

    def _count(self, factor: float | None) -> None:
        self._capacity_factor = factor
        self._counts = self._network.expert_counts(factor)
        self._scheduler.shares_prefixes = self._counts is None

    def generate(
        self, prompts: Many[Many[int]], params: SamplingParams | Many[SamplingParams]
    ) -> list[Completion]:
        """See EngineProtocol. Raises StateError while other requests are unfinished: their outputs would be lost; and
        the first error that ended a request, after the others are done.
        """
        if self.has_work:
            raise StateError(
                "The engine has unfinished requests.", "Step until has_work is False, then generate."
            )
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [Request(str(i), tuple(p), q) for i, (p, q) in enumerate(zip(prompts, each, strict=True))]
        for request in requests:
            self._check(request)
        for request in requests:
            self.add(request)
        outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
        while self.has_work:
            for output in self.step():
                outputs[output.request_id].append(output)
        return [completion_of(some) for some in outputs.values()]

    def _compute(self, tiles: list[Work], rows: list[Work], started: float) -> list[Output]:
        """Run the network on a step's work, and draw where a sequence has come to its last token.

        Args:
            started: the thread's CPU seconds when the step began.
        """
        with torch.inference_mode():
            hidden = [
                self._network.forward([_piece(w) for w in works], self.cache, tiled, self._counts)
                for works, tiled in ((tiles, True), (rows, False))
                if works
            ]
            self._prompt_tokens += sum(w.end - w.start for w in tiles)
            ends = [w for w in tiles + rows if w.is_last]
            if not ends:
                return []
            found = [w.is_last for w in tiles + rows for _ in range(len(w.draft) + 1)]
            index = torch.tensor(found, device=hidden[0].device).nonzero().squeeze(1)
            logits_NV = self._network.logits(torch.cat(hidden).index_select(0, index))
            drawn = iter(
                draw_tokens(logits_NV, [Place(w, at) for w in ends for at in range(len(w.draft) + 1)])
            )
        share = (time.thread_time() - started + self._cpu_seconds - self._shared_seconds) / len(ends)
        self._shared_seconds += share * len(ends)
        return [
            output
            for work in ends
            for output in self._accept(work, [next(drawn) for _ in range(len(work.draft) + 1)], share)
        ]

    def _accept(self, work: Work, drawn: Many[Drawn | EscalaError], share: float) -> list[Output]:
        """What was drawn after a sequence's last token, and after those of its draft that are what was drawn before
        them; `share`: of the step's CPU seconds.
        """
        sequence, outputs = work.sequence, list[Output]()
        for guess, one in zip((*work.draft, None), drawn, strict=True):
            outputs.append(self._advance(sequence, one))
            if outputs[-1].finish_reason is not None or sequence.tokens[-1] != guess:
                break
        tokens = tuple(token for o in outputs for token in o.token_ids)
        if self._speculation is not None:
            self._speculation.learn(sequence, tokens)
        if work.draft:
            accepted = max(0, len(tokens) - 1)
            self._scheduler.settle(work, accepted)
            self._drafted += len(work.draft)
            self._accepted += accepted
        return _merged(outputs, len(work.draft), share)

    def _advance(self, sequence: Sequence, drawn: Drawn | EscalaError) -> Output:
        """The output of a token that was drawn; where something of this request fails, its error, and its end."""
        if isinstance(drawn, EscalaError):
            return self._fail(sequence, drawn)
        try:
            return self._append(sequence, *drawn)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  a decoder's panic, say; the others' responses go on
            return self._fail(sequence, failed(sequence.request.id, error))

    def _fail(self, sequence: Sequence, error: EscalaError) -> Output:
        request = sequence.request.id
        if request in self._sequences:
            self._end(sequence)
            self._finished += 1
        return Output(request, (), (), "", "error", self._version, error)

    def _leave(self, sequence: Sequence) -> Output:
        """A cancelled request's end, with the text that was held back."""
        try:
            text = sequence.text.finish() if sequence.text else ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  as in `_advance`
            return self._fail(sequence, failed(sequence.request.id, error))
        self._end(sequence)
        return Output(sequence.request.id, (), (), text, "cancelled", self._version)

    def _append(self, sequence: Sequence, token: int, logprob: float) -> Output:
        sequence.tokens.append(token)
        self._generated += 1
        params, text, stream = sequence.request.params, "", sequence.text
        reason: FinishReason | None = None
        is_end = token in self._ends and not params.ignore_eos
        if is_end or token in params.stop_token_ids:
            reason = "stop"
        elif stream is not None:
            text = stream.push(token)
        if reason is None and sequence.generated >= params.max_tokens:
            reason = "length"
        if stream is not None:
            text += stream.finish() if reason else ""
            reason = "stop" if stream.stopped else reason
        if reason:
            self._end(sequence)
            self._finished += 1
        return Output(sequence.request.id, (token,), (logprob,), text, reason, self._version)

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.id]
        if self._speculation is not None:
            self._speculation.end(sequence)

    def _check(self, request: Request) -> None:
        """Raise SpecError where the request can never run."""
        for what, fix in self._problems(request):
            raise SpecError(f"Request {request.id!r} can't run: {what}.", fix)

    def _problems(self, request: Request) -> Iterator[tuple[str, str]]:
        """What is wrong and how to fix it; the cheap checks first, so that a long prompt is not read in vain."""
        params, prompt = request.params, request.prompt_token_ids
        total = len(prompt) + params.max_tokens
        room = self._scheduler.room + 1  # the last token's keys go nowhere
        if request.id in {*self._sequences, *(output.request_id for output in self._cancelled)}:
            yield "its id is in use", "Give every unfinished request an id of its own."
        if not prompt:
            yield "its prompt is empty", "Send one token at least, the end of text for instance."
        if len(prompt) > self.max_context_tokens:
            yield (
                f"its prompt has {len(prompt)} tokens, the context holds {self.max_context_tokens}",
                "Shorten it.",
            )
        vocabulary = self._network.config.vocab_size
        for token in _foreign((*prompt, *params.stop_token_ids), vocabulary):
            wrong = f"token {shown(token)} is not of the vocabulary of {vocabulary}"
            yield wrong, "Use the model's tokenizer."
        for most, holder, fix in (
            (self.max_context_tokens, "context", "Shorten the prompt or lower max_tokens."),
            (room, "cache", "Raise the engine's cache_tokens, or lower max_tokens."),
        ):
            if total > most:
                yield f"prompt and max_tokens make {shown(total)} tokens, the {holder} holds {most}", fix
        if params.stop and self._tokenizer is None:
            yield "it has stop strings, the engine has no tokenizer", "Use stop_token_ids."


def _foreign(tokens: Many[object], vocabulary: int) -> Iterator[object]:
    """Those that are no ids of the vocabulary. A long prompt of good ones is seen to be so at once."""
    if all(issubclass(kind, Integral) for kind in set(map(type, tokens))):
        ids: Any = tokens
        if not ids or (min(ids) >= 0 and max(ids) < vocabulary):
            return
    for token in tokens:
        if not isinstance(token, Integral) or not 0 <= int(token) < vocabulary:
            yield token


def _piece(work: Work) -> TokenSpan:
    tokens = [*work.sequence.tokens[work.start : work.end], *work.draft]
    sequence = work.sequence
    return TokenSpan(tokens, work.start, sequence.table, len(work.draft) + 1, sequence.slot)


def _merged(outputs: list[Output], drafted: int, share: float) -> list[Output]:
    """The tokens of one sequence's step in one output; an error in one of its own."""
    if len(outputs) > 1 and outputs[-1].error is not None:
        return [*_merged(outputs[:-1], drafted, share), outputs[-1]]
    return [
        Output(
            outputs[-1].request_id,
            tuple(token for o in outputs for token in o.token_ids),
            tuple(logprob for o in outputs for logprob in o.logprobs),
            "".join(o.text for o in outputs),
            outputs[-1].finish_reason,
            outputs[-1].weights_version,
            outputs[-1].error,
            drafted,
            share,
        )
    ]
