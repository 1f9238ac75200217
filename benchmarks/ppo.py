"""CPU seconds of one PPO iteration, ours against TRL 1.12.0 (the last release with a PPO trainer).

A 5 M actor, a critic, a reward model and a reference of the same size, each separate; 32 prompts of 16 tokens,
responses of 64, 4 epochs of one minibatch; fp32, one thread. Each side is a process of its own, drawing included; ours
has the generation engine in the same process. The first iteration warms up, the best of the others counts. A last line,
without a floor: ours with the matmul precision that it chooses for itself. Exit code 1 below the floor.

    python benchmarks/ppo.py --trl-python VENV/bin/python [--iterations 3]

VENV: a Python environment with trl==1.12.0 and the same torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FLOOR = 1.3
SHAPE = {"vocab_size": 4096, "n_layers": 6, "d_model": 256, "n_heads": 4, "max_context_tokens": 128}
D_FF = 704  # what our configuration derives of d_model
PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS, EPOCHS = 32, 16, 64, 4
RATE = 1e-5


def main() -> int:
    """Measure both sides; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", required=True, help="a Python with trl==1.12.0")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--precision", default="highest", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        import torch

        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")  # where it is "auto", our trainer sets its choice
        seconds = {"escala": escala, "trl": trl}[options.side](options.iterations, options.precision)
        print(json.dumps({"seconds": seconds, "precision": torch.get_float32_matmul_precision()}), flush=True)
        return 0
    best = {}
    for name, side, precision in (
        ("TRL", "trl", "highest"),
        ("escala", "escala", "highest"),
        ("own choice", "escala", "auto"),
    ):
        python = options.trl_python if side == "trl" else sys.executable
        found, used = run(side, python, precision, options.iterations)
        best[name] = min(found[1:])
        each = ", ".join(f"{x:.2f}" for x in found)
        print(f"{name}, {used}: {each} CPU seconds an iteration", flush=True)
    ratio = best["TRL"] / best["escala"]
    print(
        f"5M, precision 'highest': TRL {best['TRL']:.2f} s, escala {best['escala']:.2f} s, "
        f"ratio {ratio:.2f} (floor {FLOOR}); escala at its own choice of precision ({used}) "
        f"{best['own choice']:.2f} s, {best['TRL'] / best['own choice']:.2f}"
    )
    return 0 if ratio >= FLOOR else 1


def run(side: str, python: str, precision: str, iterations: int) -> tuple[list[float], str]:
    """CPU seconds of each iteration of one side, and the matmul precision in force at its end."""
    command = [python, __file__, "--side", side, "--trl-python", "none", "--precision", precision]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if side == "trl":
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*command, "--iterations", str(iterations)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = next(x for x in reversed(done.stdout.splitlines()) if x.startswith('{"seconds"'))
    found = json.loads(line)
    seconds: list[float] = found["seconds"]
    if len(seconds) < 2:
        raise RuntimeError(f"{side} made {len(seconds)} iterations")
    return seconds, found["precision"]


def vocabulary() -> Any:
    """A word for each token id: t0, t1, ...; t0 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="t1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def prompts(count: int) -> list[list[int]]:
    """Random prompts of equal length, without the token that ends a text."""
    import random

    draw = random.Random(0)
    return [[draw.randrange(2, SHAPE["vocab_size"]) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def escala(iterations: int, precision: str) -> list[float]:
    """`workloads.ppo`'s own iterations, one engine in this process for the rollout service."""
    import torch
    import torch.distributed as dist

    from escala.contract.records import AttemptSpec
    from escala.rollouts.weights import WeightVersion
    from escala.schema import ModelConfig, PpoConfig
    from escala.tracking.tracker import open_tracker
    from workloads.alignment.ppo_step import PpoStep
    from workloads.alignment.rollouts import PromptTokens, save_prompts
    from workloads.generation.engine import Engine
    from workloads.model.transformer import Transformer
    from workloads.rewards.reward_model import RewardModel
    from workloads.serving.records import Generated
    from workloads.training.entry import WorkerInputs
    from workloads.training.loop import RunLoop
    from workloads.training.step import Counters, StepResult

    config = PpoConfig(
        model=SHAPE,
        tokenizer="none",
        prompts="none",
        rewards=[{"kind": "model", "model": "none"}],
        sampling={"max_response_tokens": RESPONSE_TOKENS},
        batch={"prompts": PROMPTS, "epochs": EPOCHS},
        critic={"learning_rate": RATE, "value_clip": 0.2},
        kl={"limit_nats_per_token": 100},
        training={
            "steps": iterations,
            "zero_stage": 0,
            "checkpoint_every_steps": 0,
            "matmul_precision": precision,
            "optimizer": {"learning_rate": RATE},
        },
    )

    class Service:
        """The engine, and the reward model, which reads what was drawn last."""

        def __init__(self) -> None:
            self.engine = Engine(Transformer(ModelConfig(**SHAPE)), None, threads=None)
            self.reward = RewardModel(Transformer(ModelConfig(**SHAPE))).eval()
            self.drawn = torch.empty(0)

        def generate(self, prompts: Any, params: Any, min_version: int = 0) -> list[Any]:
            found = self.engine.generate(prompts, params)
            self.drawn = torch.tensor([[*p, *f.token_ids] for p, f in zip(prompts, found, strict=True)])
            version = WeightVersion(self.engine.weights_version, "0", "fp32")
            return [Generated(one, version, PROMPT_TOKENS) for one in found]

        @torch.no_grad()
        def score(self, prompts: Any, responses: Any) -> list[float]:
            lengths = torch.full((len(self.drawn),), self.drawn.shape[1])
            return self.reward(self.drawn, lengths).tolist()  # type: ignore[no-any-return]

        def publish(self, state: Any, version: int, *, timeout_seconds: float = 0.0) -> None:
            self.engine.load_weights(state, version)

    class TimedStep(PpoStep):
        """Notes the CPU seconds of each iteration."""

        seconds_each: list[float] = []

        def run(self, count: Counters) -> StepResult:
            begun = time.process_time()
            result = super().run(count)
            self.seconds_each.append(time.process_time() - begun)
            return result

    root = Path(tempfile.mkdtemp())
    places = {name: str(root / name) for name in ("attempt", "checkpoints", "data")}
    for place in places.values():
        Path(place).mkdir()
    spec = AttemptSpec(
        "bench", 1, "bench", "ppo", "workloads.ppo", config.model_dump(mode="json"),
        places["attempt"], places["checkpoints"], places["data"], f"spool:{root / 'spool'}", "bench",
    )  # fmt: skip
    save_prompts([PromptTokens("", ids) for ids in prompts(PROMPTS * iterations)], root)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    run_id = open_tracker(spec.tracking_uri).start("bench", "bench", "bench", {}, {})
    fingerprints = {"corpus": "0", "tokenizer": "0", "evaluation": "0"}
    inputs: WorkerInputs[PpoConfig] = WorkerInputs(spec, str(root), None, run_id, fingerprints)
    step = TimedStep(inputs, Service())
    loop = RunLoop(inputs, lambda _: step)
    loop.run()
    loop.close()
    if step.measures["response_tokens"] != RESPONSE_TOKENS:
        raise RuntimeError("not all responses have full length")
    return step.seconds_each


def trl(iterations: int, precision: str) -> list[float]:
    """TRL's PPOTrainer on Llamas of the same shape; an iteration ends with its logging."""
    import torch
    from datasets import Dataset
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    shape = LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["d_model"],
        intermediate_size=D_FF,
        num_hidden_layers=SHAPE["n_layers"],
        num_attention_heads=SHAPE["n_heads"],
        max_position_embeddings=SHAPE["max_context_tokens"],
        tie_word_embeddings=True,
        num_labels=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)

    class Clock(TrainerCallback):  # type: ignore[misc]
        """CPU seconds between the ends of iterations."""

        def __init__(self) -> None:
            self.last, self.seconds = time.process_time(), []  # type: ignore[var-annotated]

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            now = time.process_time()
            self.seconds.append(now - self.last)
            self.last = now

    clock = Clock()
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PROMPTS,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        local_rollout_forward_batch_size=PROMPTS,
        response_length=RESPONSE_TOKENS,
        total_episodes=PROMPTS * iterations,
        num_sample_generations=0,
        temperature=1.0,
        learning_rate=RATE,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"input_ids": prompts(PROMPTS * iterations)})
    trainer = PPOTrainer(
        args=arguments,
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=vocabulary(), eos_token="t0", pad_token="t0"
        ),
        model=LlamaForCausalLM(shape),
        ref_model=LlamaForCausalLM(shape),
        reward_model=LlamaForSequenceClassification(shape),
        value_model=LlamaForSequenceClassification(shape),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


if __name__ == "__main__":
    sys.exit(main())
