"""Tokens per second of one worker at ZeRO stage 0 against a plain PyTorch loop and Hugging Face's Trainer.

Each side runs in a process of its own, one thread, same shape, same batch, same fused AdamW, same matmul
precision. The sides take turns, several blocks each, and each side's best block counts: the machine's other
load only ever slows a block down. One line a ratio; exit code 1 below a floor.

    python benchmarks/throughput.py [--blocks 5] [--precision highest]
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
from pathlib import Path

FLOORS = {"plain": 0.95, "huggingface": 1.05}
CONTEXT, BATCH = 256, 4
SHAPES = {
    "20M": {"vocab_size": 4096, "n_layers": 8, "d_model": 448, "n_heads": 7, "max_context_tokens": CONTEXT},
    "5M": {"vocab_size": 4096, "n_layers": 6, "d_model": 256, "n_heads": 4, "max_context_tokens": CONTEXT},
}
Block = Callable[[int], float]  # steps -> seconds


def main() -> int:
    """Measure all shapes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps in a block")
    parser.add_argument("--precision", default="medium", choices=["highest", "medium"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return serve(options.side, options.shape, options.precision)
    good = True
    for shape in SHAPES:
        seconds = measure(shape, options.blocks, options.steps, options.precision)
        speed = {side: options.steps * BATCH * CONTEXT / best for side, best in seconds.items()}
        for other, floor in FLOORS.items():
            ratio = speed["escala"] / speed[other]
            binds = shape == "20M"
            good &= ratio >= floor or not binds
            print(
                f"{shape} {options.precision}: escala stage 0 {speed['escala']:.0f} tokens/s, {other} "
                f"{speed[other]:.0f}, ratio {ratio:.3f} ({f'floor {floor}' if binds else 'no floor'})",
                flush=True,
            )
    return 0 if good else 1


def measure(shape: str, blocks: int, steps: int, precision: str) -> dict[str, float]:
    """Best seconds of a block, by side; the sides take turns."""
    sides = ["escala", *FLOORS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--shape", shape, "--precision", precision, "--side"]
    processes = {
        side: subprocess.Popen(
            [*command, side], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for side in sides
    }
    for side in sides:
        ask(processes[side], 1)  # start-up and one step to warm up
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for block in range(blocks):
        for side in sides if block % 2 == 0 else reversed(sides):
            seconds[side].append(ask(processes[side], steps))
    for process in processes.values():
        process.communicate("0\n")
    return {side: min(values) for side, values in seconds.items()}


def ask(process: subprocess.Popen[str], steps: int) -> float:
    """Have a side run `steps` steps; its seconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith('{"seconds"'):  # Trainer prints a dictionary of its own
            return float(json.loads(line)["seconds"])
    raise RuntimeError(f"a side ended with code {process.wait()}")


def serve(side: str, shape: str, precision: str) -> int:
    """One side: answer each number of steps on stdin by the seconds that they took."""
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(precision)
    block = {"escala": escala_side, "plain": plain_side, "huggingface": huggingface_side}[side](shape)
    for line in sys.stdin:
        if int(line) == 0:
            break
        print(json.dumps({"seconds": block(int(line))}), flush=True)
    return 0


def escala_side(shape: str) -> Block:
    """The step that pretraining makes: step.accumulate, zero.optimizer_step, the agreement all-reduce."""
    import torch
    import torch.distributed as dist

    from escala.schema import ModelConfig, TrainingConfig
    from workloads.model.transformer import Transformer
    from workloads.training import zero
    from workloads.training.gradient import accumulate
    from workloads.training.loss import next_token_loss

    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    training = TrainingConfig(steps=1, zero_stage=0)
    torch.manual_seed(0)
    engine = zero.make_engine(Transformer(ModelConfig(**SHAPES[shape])), training, BATCH, 1)

    def block(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            loss = accumulate(engine, [tokens(shape)], 1, BATCH * CONTEXT, next_token_loss)
            agreed = torch.stack([loss.double(), torch.zeros((), dtype=torch.float64)])
            dist.all_reduce(agreed)
            agreed.tolist()
            zero.set_learning_rate(engine, 1e-4)
            zero.optimizer_step(engine, training)
        return time.perf_counter() - start

    return block


def plain_side(shape: str) -> Block:
    """The same model in twelve lines of PyTorch: mean cross entropy, clipping at 1, fused AdamW."""
    import torch
    import torch.nn.functional as F

    from escala.schema import ModelConfig
    from workloads.model.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPES[shape]))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def block(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            batch = tokens(shape)
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        return time.perf_counter() - start

    return block


def huggingface_side(shape: str) -> Block:
    """`transformers.Trainer` on a Llama of the same shape, fused AdamW; timed from its first step to its
    last.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from escala.schema import ModelConfig

    ours = ModelConfig(**SHAPES[shape])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.d_model,
            intermediate_size=ours.ff_size,
            num_hidden_layers=ours.n_layers,
            num_attention_heads=ours.n_heads,
            num_key_value_heads=ours.kv_heads,
            head_dim=ours.head_size,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=ours.tie_embeddings,
        )
    )

    class Clock(TrainerCallback):  # type: ignore[misc]
        seconds = 0.0

        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == 0:
                self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.seconds = time.perf_counter() - self.start

    def block(steps: int) -> float:
        rows = [{"input_ids": row, "labels": row} for _ in range(steps) for row in tokens(shape)[:, :-1]]
        clock = Clock()
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock]).train()
        return clock.seconds

    return block


def tokens(shape: str):  # type: ignore[no-untyped-def]
    """tokens_BT1, random: speed does not depend on them."""
    import torch

    return torch.randint(0, SHAPES[shape]["vocab_size"], (BATCH, CONTEXT + 1))


if __name__ == "__main__":
    sys.exit(main())
