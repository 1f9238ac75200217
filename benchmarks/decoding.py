"""Milliseconds that a token of generation takes by kind of attention and context: batch 1, one thread, fp32.

A model of 4 layers with 4 heads of 64; window 512, 256 features, 16 landmarks. The context's keys and values are random
and written as a forward pass would write them, for prefilling 32,768 tokens by exact attention says nothing of
decoding. Kinds and contexts take turns; the best round's CPU seconds count, for other load only ever slows one down.

Exit code 1 where features or hybrid take more than 1.25 times as long at 32,768 as at 1,024 tokens, or are not 4 times
as fast as exact there.

    python benchmarks/decoding.py [--rounds 5] [--tokens 32]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch

from escala.schema import ModelConfig
from workloads.generation.network import Network, TokenSpan
from workloads.model.attention.registry import DecodeState
from workloads.model.transformer import Transformer

CONTEXTS = (1024, 8192, 32_768)
KINDS = ("exact", "window", "features", "hybrid", "nystrom")
CONSTANT, FASTER = ("features", "hybrid"), 4.0
MOST_GROWTH = 1.25
WINDOW = 512
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # read by the C library when a process starts


class Context:
    """A sequence of `length` positions in a cache of its own, to which tokens are added."""

    def __init__(self, net: Network, length: int, more: int) -> None:
        config = net.config
        size = config.attention.block_tokens(config) or 32
        live = config.attention.live_blocks(config, size)
        places = -(-(length + more) // size)
        blocks = places if live is None else min(places, live + 1)
        self.net, self.length = net, length
        self.table = [place % blocks for place in range(places)]
        self.cache = net.decode_state(blocks, size)
        for start in range(0, length, size):
            self._write(self.cache, range(start, min(start + size, length)))

    def _write(self, cache: DecodeState, span: range) -> None:
        config, size = self.net.config, cache.block_tokens
        borders = cache.plan_borders([self.table], [span])
        at = torch.arange(span.start, span.stop)
        blocks = torch.tensor(self.table)[at // size]
        for layer in range(config.n_layers):
            k, v = torch.randn(2, len(span), config.kv_heads, config.head_size)
            cache.write(layer, blocks, at % size, k, v, borders)

    def decode(self, tokens: int) -> float:
        """CPU milliseconds a token; the same positions are written each time."""
        token, started = 1, time.process_time()
        for position in range(self.length, self.length + tokens):
            hidden = self.net.forward([TokenSpan([token], position, self.table)], self.cache, tiled=False)
            token = int(self.net.logits(hidden).argmax())
        return (time.process_time() - started) / tokens * 1e3


def model_of(kind: str) -> Transformer:
    """Random weights."""
    torch.manual_seed(0)
    window = None if kind in ("exact", "features") else WINDOW
    return Transformer(
        ModelConfig(
            vocab_size=1024,
            n_layers=4,
            d_model=256,
            n_heads=4,
            max_context_tokens=2 * max(CONTEXTS),
            attention=kind,
            window_tokens=window,
        )
    )


def measure(kinds: Sequence[str], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Milliseconds a token by kind, of each context."""
    nets = {kind: Network(model_of(kind)) for kind in kinds}
    contexts = {kind: [Context(net, length, tokens) for length in CONTEXTS] for kind, net in nets.items()}
    best = {kind: [float("inf")] * len(CONTEXTS) for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            found = [context.decode(tokens) for context in contexts[kind]]
            best[kind] = list(map(min, best[kind], found))
    return best


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of all kinds")
    parser.add_argument("--tokens", type=int, default=32, help="of a round, in each context")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        best = measure(KINDS, options.rounds, options.tokens)
    print("ms a token   " + "".join(f"{length:>10,}" for length in CONTEXTS) + "     exact's", flush=True)
    good = True
    for kind, found in best.items():
        ratio, growth = best["exact"][-1] / found[-1], found[-1] / found[0]
        print(f"  {kind:<11}" + "".join(f"{each:10.2f}" for each in found) + f"{ratio:10.1f}x", flush=True)
        if kind in CONSTANT:
            is_met = ratio >= FASTER and growth <= MOST_GROWTH
            said = "met" if is_met else "MISSED"
            print(f"    grows {growth:.2f} times (at most {MOST_GROWTH}); floor {FASTER:g}x: {said}")
            good &= is_met
    return 0 if good else 1


if __name__ == "__main__":
    if os.environ.get("GLIBC_TUNABLES") != HUGE_PAGES:  # as training workers and replicas have them
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())
