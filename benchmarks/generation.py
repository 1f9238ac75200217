"""Tokens per second of the generation engine against Hugging Face's `generate`, or vLLM: one thread, same Llama.

96 requests, prompts and responses of 16 to 128 tokens, lengths fixed here, end of text ignored, greedy on both sides.
At batch 32 `generate` gets three left-padded batches, each run to its longest response, as static batching must; the
engine 32 places. At batch 1 both take some of the requests one after another. Only tokens that somebody asked for
count; the ratio per computed token, padding included, stands beside it without a floor. The sides take turns; CPU
seconds of each side's best block count, for the machine's other load only ever slows a block down. Both have huge pages
for their weights, as training workers do: without them a packed product of 4 rows takes 1.4 times as long. The engine's
kernels are measured for each batch size and printed; that responses don't depend on it is shown with those of 32.

The bound is the larger of multiplications at the measured peak and bytes (weights once a step, keys and values once a
token) at the measured bandwidth. One line a ratio; exit code 1 below a floor, or where a request's tokens change with
the batch.

    python benchmarks/generation.py [--blocks 2] [--batches 1 32] [--dtypes fp32] [--vllm-python PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from escala.schema import ModelConfig
from workloads.generation.engine import Engine
from workloads.generation.kernel_choice import EngineLimits, Product, first
from workloads.generation.linear import form_of
from workloads.generation.network import MEASURED
from workloads.generation.protocol import Completion, SamplingParams
from workloads.model.transformer import Transformer

FLOORS = {("fp32", 32): 2.5, ("fp32", 1): 1.0}
"""Of bf16 none: a CPU without its arithmetic is slower in it than in fp32, on both sides."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE = ModelConfig(
    vocab_size=8192, n_layers=12, d_model=640, n_heads=10, d_ff=1600, max_context_tokens=256
)  # 61.8 M parameters, embeddings tied
REQUESTS, ALONE = 96, 4
COUNTS = {1: ALONE, 32: REQUESTS}
"""Requests of each batch size; the bits of responses are compared with the last one's kernels."""
NAMES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # read by the C library when a process starts
Tokens = list[list[int]]


@dataclass
class Best:
    """The best block of a side: CPU and wall seconds, and what it generated."""

    cpu_seconds: float = float("inf")
    wall_seconds: float = float("inf")
    tokens: Tokens | None = None

    def run(self, work: Callable[[], Tokens]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.tokens = work()
        self.cpu_seconds = min(self.cpu_seconds, time.process_time() - cpu)
        self.wall_seconds = min(self.wall_seconds, time.perf_counter() - wall)


def main() -> int:
    """Measure both precisions at both batch sizes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2, help="runs of each side")
    parser.add_argument(
        "--precision", default="highest", choices=["highest", "medium"], help="of fp32 products"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=list(COUNTS), choices=list(COUNTS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument(
        "--vllm-python",
        help="Python of an environment with vLLM's CPU build: the peer instead of transformers",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(options.precision)
    good = True
    for name in options.dtypes:
        if options.vllm_python:
            measure_vllm(name, options)
        else:
            good &= measure(name, options)
    return 0 if good else 1


def requests() -> tuple[Tokens, list[int]]:
    """Prompts, and the lengths of their responses."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 129, (2, REQUESTS), generator=generator).tolist()
    prompts = [torch.randint(SHAPE.vocab_size, (n,), generator=generator).tolist() for n in lengths[0]]
    return prompts, lengths[1]


def measure(name: str, options: argparse.Namespace) -> bool:
    """Both batch sizes in one precision; whether all floors are met."""
    torch.manual_seed(0)
    ours = Transformer(SHAPE).to(DTYPES[name])
    peer = hugging_face(ours)
    prompts, lengths = requests()
    peak, bandwidth = peak_flops(DTYPES[name]), read_bandwidth()
    print(f"{name}: peak {peak / 1e9:.0f} GFLOP/s, reading {bandwidth / 1e9:.1f} GB/s", flush=True)
    good, kernels = True, MEASURED
    for batch in options.batches:
        count = COUNTS[batch]
        some, wanted = prompts[:count], lengths[:count]
        engine, reference, kernels = Best(), Best(), MEASURED
        params = [SamplingParams(max_tokens=n, temperature=0) for n in wanted]
        for _ in range(options.blocks):
            made = Engine(ours, None, max_running=batch, kernels=kernels)
            if kernels == MEASURED:
                kernels = made.kernels
                print(f"{name} batch {batch}: {shown(made)}", flush=True)
            engine.run(lambda: [list(c.token_ids) for c in made.generate(some, params)])  # noqa: B023
            reference.run(lambda: static_batches(peer, some, wanted, batch))  # noqa: B023
        copied = made.cache.copied_blocks * made.cache.block_bytes * 2 / bandwidth / engine.cpu_seconds
        good &= report(name, batch, wanted, engine, reference)
        floor_seconds, binds = bound(some, wanted, batch, ours, peak, bandwidth)
        print(
            f"  {floor_seconds / engine.cpu_seconds:.0%} of the bound ({sum(wanted) / floor_seconds:.0f} tokens/s, "
            f"{binds} binds); copies of cache blocks took about {copied:.1%} of the time",
            flush=True,
        )
    same = responses(ours, prompts, lengths, 1, kernels) == responses(ours, prompts, lengths, 32, kernels)
    print(f"{name}: responses at batch 1 and 32 are {'the same' if same else 'DIFFERENT'}", flush=True)
    return good and same


def shown(engine: Engine) -> str:
    """The kernels that were chosen, and by what."""
    times = [
        f"{timing.form} {timing.rows} rows: "
        + ", ".join(f"{kernel} {seconds * 1e3:.2f} ms" for kernel, seconds in timing.seconds.items())
        for timing in engine.timings
    ]
    return f"kernels {engine.kernels} ({'; '.join(times)})"


def responses(
    model: Transformer, prompts: Tokens, lengths: list[int], batch: int, kernels: str
) -> list[Completion]:
    """Tokens and log-probabilities of the first ALONE requests, drawn among others, with given kernels."""
    count = ALONE if batch == 1 else batch
    engine = Engine(model, None, max_running=batch, kernels=kernels)
    params = [SamplingParams(max_tokens=n, seed=at) for at, n in enumerate(lengths[:count])]
    return engine.generate(prompts[:count], params)[:ALONE]


def report(name: str, batch: int, wanted: list[int], engine: Best, reference: Best) -> bool:
    """Print the ratio's line; whether its floor is met."""
    ratio, floor = reference.cpu_seconds / engine.cpu_seconds, FLOORS.get((name, batch))
    total = sum(wanted)
    computed = sum(
        max(wanted[i : i + batch]) * len(wanted[i : i + batch]) for i in range(0, len(wanted), batch)
    )
    same = sum(a == b for a, b in zip(engine.tokens or [], reference.tokens or [], strict=True))
    print(
        f"{name} batch {batch}: escala {total / engine.cpu_seconds:.0f} tokens/s, transformers "
        f"{total / reference.cpu_seconds:.0f}, ratio {ratio:.2f} (floor {floor}; wall "
        f"{reference.wall_seconds / engine.wall_seconds:.2f}; per computed token {ratio * total / computed:.2f}); "
        f"{same} of {len(wanted)} responses equal",
        flush=True,
    )
    return floor is None or ratio >= floor


def static_batches(peer: LlamaForCausalLM, prompts: Tokens, wanted: list[int], batch: int) -> Tokens:
    """`generate` on left-padded batches, each to its longest response; every response cut to its own length."""
    responses = []
    for at in range(0, len(prompts), batch):
        some, lengths = prompts[at : at + batch], wanted[at : at + batch]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
        longest = max(lengths)
        with torch.inference_mode():
            out = peer.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert out.shape[1] == width + longest
        responses += [row[width : width + n].tolist() for row, n in zip(out, lengths, strict=True)]
    return responses


def hugging_face(model: Transformer) -> LlamaForCausalLM:
    """A Llama with the same weights, in the same dtype."""
    settings = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.d_model,
        intermediate_size=SHAPE.ff_size,
        num_hidden_layers=SHAPE.n_layers,
        num_attention_heads=SHAPE.n_heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_size,
        rms_norm_eps=SHAPE.norm_eps,
        max_position_embeddings=SHAPE.max_context_tokens,
        tie_word_embeddings=True,
    )
    peer = LlamaForCausalLM(settings).to(model.embedding.weight.dtype).eval()
    theirs = dict(peer.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            for old, new in NAMES.items():
                name = name.replace(old, new)
            theirs.pop(name).copy_(weight)
    assert not theirs, sorted(theirs)
    return peer


def bound(
    prompts: Tokens, wanted: list[int], batch: int, model: Transformer, peak: float, bandwidth: float
) -> tuple[float, str]:
    """(seconds that these requests take at least, what binds)."""
    parameters = sum(p.numel() for p in model.parameters())
    item = model.embedding.weight.element_size()
    pairs = list(zip(map(len, prompts), wanted, strict=True))
    head = SHAPE.vocab_size * SHAPE.d_model  # of a prompt's tokens only the last one's logits are needed
    flops = 2 * sum((p + r) * parameters - p * head for p, r in pairs)
    context = sum(r * p + r * (r - 1) / 2 for p, r in pairs)  # positions read by all tokens of the responses
    kv_bytes = 2 * SHAPE.n_layers * SHAPE.kv_heads * SHAPE.head_size * item
    read = sum(wanted) / batch * parameters * item + context * kv_bytes
    compute, memory = flops / peak, read / bandwidth
    return max(compute, memory), "multiplication" if compute > memory else "reading"


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the best of plain and laid out products of 1,024 rows, CPU time."""
    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    limits = EngineLimits(1024, 1024)
    packed = Product(b, first([b], limits)[form_of(b)], limits)
    with torch.inference_mode():
        seconds = min(cpu_seconds(lambda: a @ b), cpu_seconds(lambda: packed(a)))
    return 2 * 1024**3 / seconds


def read_bandwidth() -> float:
    """Bytes per second of a sum over 256 MB, CPU time."""
    numbers = torch.ones(1 << 26)
    return numbers.numel() * 4 / cpu_seconds(numbers.sum)


def cpu_seconds(work: Callable[[], object]) -> float:
    """The best of ten."""
    best = float("inf")
    for _ in range(10):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def measure_vllm(name: str, options: argparse.Namespace) -> None:
    """Print the engine's line beside vLLM's, batch 32, in turns; no floor. vLLM is one process with one thread."""
    torch.manual_seed(0)
    ours = Transformer(SHAPE).to(DTYPES[name])
    prompts, lengths = requests()
    params = [SamplingParams(max_tokens=n, temperature=0) for n in lengths]
    engine, theirs = Best(), Best()
    with tempfile.TemporaryDirectory() as directory:
        hugging_face(ours).save_pretrained(directory)
        dtype = str(DTYPES[name]).removeprefix("torch.")
        work = json.dumps({"model": directory, "prompts": prompts, "lengths": lengths, "dtype": dtype})
        Path(directory, "work.json").write_text(work)
        command = [options.vllm_python, "-c", VLLM, str(Path(directory, "work.json"))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(options.blocks):
                print(file=process.stdin, flush=True)
                line = process.stdout.readline()
                if not line:
                    sys.exit(
                        f"vLLM ended with code {process.wait()} before its block; its error stands above"
                    )
                block = json.loads(line)
                theirs.tokens = block["tokens"]
                theirs.cpu_seconds = min(theirs.cpu_seconds, block["cpu_seconds"])
                theirs.wall_seconds = min(theirs.wall_seconds, block["wall_seconds"])
                made = Engine(ours, None, max_running=32)
                engine.run(lambda: [list(c.token_ids) for c in made.generate(prompts, params)])  # noqa: B023
    same = sum(a == b for a, b in zip(engine.tokens or [], theirs.tokens or [], strict=True))
    total = sum(lengths)
    print(
        f"{name} batch 32: escala {total / engine.cpu_seconds:.0f} tokens/s, vLLM {total / theirs.cpu_seconds:.0f}, "
        f"ratio {theirs.cpu_seconds / engine.cpu_seconds:.2f} (no floor; wall "
        f"{theirs.wall_seconds / engine.wall_seconds:.2f}); {same} of {len(lengths)} responses equal",
        flush=True,
    )


# A line in, a block generated, a line out. Without prefix caching, or the second block would find the first's prompts.
VLLM = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    work = json.load(open(sys.argv[1]))
    llm = LLM(
        work["model"],
        skip_tokenizer_init=True,
        dtype=work["dtype"],
        max_num_seqs=32,
        max_model_len=256,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": p} for p in work["prompts"]]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False) for n in work["lengths"]]
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        done = llm.generate(prompts, params, use_tqdm=False)
        block = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
        block["tokens"] = [list(d.outputs[0].token_ids) for d in done]
        print(json.dumps(block), file=answers, flush=True)
"""


if __name__ == "__main__":
    if os.environ.get("GLIBC_TUNABLES") != HUGE_PAGES:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())
