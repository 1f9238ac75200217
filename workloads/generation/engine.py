"""The engine: continuous batching over a paged cache (Yu et al. 2022; Kwon et al. 2023), in one process.

Same prompt, same parameters, same weights: same tokens, bit for bit, whatever else runs, is preempted or shares a
prefix. On CPU with oneDNN and one thread this holds because every sum is taken in an order that depends on the
request and on `block_tokens` alone (see `linear`, `attention`, `scheduler`); tests compare the bits. On CUDA, and
without oneDNN, the batch's size may move a logit's last bits, and with them a draw that lies as near to its border.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from escala.errors import EscalaError, SpecError, StateError
from workloads.data.tokenizer import TextTokenizer
from workloads.generation.attention import PagedCache
from workloads.generation.network import Network, Piece
from workloads.generation.protocol import (
    Completion,
    EngineStats,
    FinishReason,
    Output,
    Request,
    SamplingParams,
)
from workloads.generation.sampling import Draw, sample
from workloads.generation.scheduler import Scheduler, Sequence, Work
from workloads.generation.text import TextStream
from workloads.model.transformer import Transformer

CACHE_BYTES = 1 << 30


class Engine:
    """`EngineProtocol` for a `Transformer`. Not thread-safe.

    Args:
        model: on its device and in its dtype. The engine makes it its own: no gradients, and `load_weights` writes it.
        tokenizer: None: no text, no end of text, no stop strings.
        max_running: requests in a batch.
        cache_tokens: positions that the cache holds, in whole blocks. None: `max_running` whole contexts, or what
            fits into CACHE_BYTES.
        block_tokens: positions of a block.
        prefill_tokens: of prompts in one step, in whole blocks: more is faster, and delays running requests longer.
        threads: torch's CPU threads, set for this process. None: left alone.

    Raises SpecError where the cache cannot hold a block.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextTokenizer | None,
        *,
        max_running: int = 32,
        cache_tokens: int | None = None,
        block_tokens: int = 32,
        prefill_tokens: int = 256,
        threads: int | None = 1,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._network, config = Network(model), model.config
        self._tokenizer = tokenizer
        self._ends = frozenset(() if tokenizer is None else tokenizer.end_ids)
        item = self._network.like.element_size()
        block_bytes = 2 * config.n_layers * config.kv_heads * config.head_size * block_tokens * item
        if cache_tokens is None:
            whole = max_running * -(-config.max_context_tokens // block_tokens)
            blocks = min(whole, CACHE_BYTES // block_bytes)
        else:
            blocks = cache_tokens // block_tokens
        if blocks < 1 or max_running < 1:
            raise SpecError(
                f"An engine of {max_running} requests with a cache of {blocks} blocks of {block_tokens} tokens, "
                f"{block_bytes} bytes each, cannot run.",
                "Raise max_running and cache_tokens, or lower block_tokens.",
            )
        self._scheduler = Scheduler(blocks, block_tokens, max_running, prefill_tokens)
        self.cache = PagedCache(
            config.n_layers, blocks, config.kv_heads, block_tokens, config.head_size, self._network.like
        )
        self._sequences: dict[str, Sequence] = {}
        self._cancelled: list[Output] = []
        self._version = 0
        self._prompt_tokens = self._generated = self._finished = self._steps = 0
        self._seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._sequences or self._cancelled)

    @property
    def weights_version(self) -> int:
        """The number last given to `load_weights`; 0 before."""
        return self._version

    @property
    def max_context_tokens(self) -> int:
        """Prompt and response together may not be longer."""
        return self._network.config.max_context_tokens

    def add(self, request: Request) -> None:
        """See EngineProtocol."""
        self._check(request)
        text = None
        if self._tokenizer is not None:
            text = TextStream(self._tokenizer.tokenizer, request.params.stop, continues=True)
        self._sequences[request.id] = self._scheduler.add(request, text)

    def cancel(self, request_id: str) -> bool:
        """See EngineProtocol."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        text = sequence.text.finish() if sequence.text else ""
        self._end(sequence)
        self._cancelled.append(Output(request_id, (), (), text, "cancelled", self._version))
        return True

    def step(self, admit: bool = True) -> list[Output]:
        """See EngineProtocol."""
        started = time.perf_counter()
        outputs, self._cancelled = self._cancelled, []
        tiles, rows = self._scheduler.plan(admit)
        if tiles or rows:
            outputs += self._compute(tiles, rows)
        self._steps += 1
        self._seconds += time.perf_counter() - started
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
            steps=self._steps,
            step_seconds=self._seconds,
        )

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """See EngineProtocol."""
        started = self.stats().started
        if started:
            raise StateError(
                f"{started} requests have begun under weights {self._version}: a response is of one version.",
                "Call step(admit=False) until stats().started is 0, or cancel them.",
            )
        self._network.load(state)
        self._scheduler.pool.clear()
        self._version = version

    def generate(
        self, prompts: Many[Many[int]], params: SamplingParams | Many[SamplingParams]
    ) -> list[Completion]:
        """See EngineProtocol. Raises StateError while other requests are unfinished: their outputs would be lost."""
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
        return [_completion(some) for some in outputs.values()]

    def _compute(self, tiles: list[Work], rows: list[Work]) -> list[Output]:
        """Run the network on a step's work, and draw where a sequence has come to its last token."""
        with torch.inference_mode():
            hidden = [
                self._network.forward([_piece(w) for w in works], self.cache, tiled)
                for works, tiled in ((tiles, True), (rows, False))
                if works
            ]
            self._prompt_tokens += sum(w.end - w.start for w in tiles)
            ends = [(i, w.sequence) for i, w in enumerate(tiles + rows) if w.end == len(w.sequence.tokens)]
            if not ends:
                return []
            index = torch.tensor([i for i, _ in ends], device=hidden[0].device)
            logits_NV = self._network.logits(torch.cat(hidden).index_select(0, index))
            drawn = sample(logits_NV, [_draw(sequence) for _, sequence in ends])
        return [
            self._append(sequence, token, logprob)
            for (_, sequence), token, logprob in zip(ends, *drawn, strict=True)
        ]

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

    def _check(self, request: Request) -> None:
        """Raise SpecError where the request can never run."""
        params, prompt = request.params, request.prompt_token_ids
        vocabulary, size = self._network.config.vocab_size, self._scheduler.block_tokens
        outside = [t for t in (*prompt, *params.stop_token_ids) if not 0 <= t < vocabulary]
        total = len(prompt) + params.max_tokens
        room = self._scheduler.pool.total * size + 1  # the last token's keys are never needed
        taken = {*self._sequences, *(output.request_id for output in self._cancelled)}
        problems: list[tuple[bool, str, str]] = [
            (
                request.id in taken,
                "its id is in use",
                "Give every unfinished request an id of its own.",
            ),
            (not prompt, "its prompt is empty", "Send one token at least, the end of text for instance."),
            (
                bool(outside),
                f"token {outside[:1]} is not of the vocabulary of {vocabulary}",
                "Use the model's tokenizer.",
            ),
            (
                total > self.max_context_tokens,
                f"prompt and max_tokens make {total} tokens, the context holds {self.max_context_tokens}",
                "Shorten the prompt or lower max_tokens.",
            ),
            (
                total > room,
                f"prompt and max_tokens make {total} tokens, the cache holds {room}",
                "Raise the engine's cache_tokens, or lower max_tokens.",
            ),
            (
                bool(params.stop) and self._tokenizer is None,
                "it has stop strings, the engine has no tokenizer",
                "Use stop_token_ids.",
            ),
        ]
        for problem, what, mend in problems:
            if problem:
                raise SpecError(f"Request {request.id!r} can't run: {what}.", mend)


def _piece(work: Work) -> Piece:
    return Piece(work.sequence.tokens[work.start : work.end], work.start, work.sequence.table)


def _draw(sequence: Sequence) -> Draw:
    return Draw(sequence.request.params, sequence.generated, sequence.tokens)


def _completion(outputs: list[Output]) -> Completion:
    last = outputs[-1]
    if last.finish_reason is None:
        raise EscalaError(f"Request {last.request_id!r} ended without a reason.", "Please report it.")
    return Completion(
        token_ids=tuple(t for o in outputs for t in o.token_ids),
        logprobs=tuple(p for o in outputs for p in o.logprobs),
        text="".join(o.text for o in outputs),
        finish_reason=last.finish_reason,
        weights_version=last.weights_version,
    )
