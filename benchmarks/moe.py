"""A mixture of experts, forward and backward, against a dense layer of equal active FLOPs and Mixtral's block.

E = 8, k = 2, d = 256, nothing dropped; our products by the kernel that is the fastest here, as in training; balance
loss and figures are on our side alone. One process, one thread, one precision; the sides take turns, and each side's
best block of CPU time counts: the machine's other load only ever slows a block down. One line a ratio; exit code 1
below a floor.

    python benchmarks/moe.py [--blocks 20] [--precision medium]
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor, nn

from escala.schema import ModelConfig
from escala.schema.moe import ExpertKernel
from workloads.model import expert_kernels
from workloads.model.layers import FeedForward
from workloads.model.moe import MixtureOfExperts, mixtures

FLOORS = {"dense": 0.9, "mixtral": 1.0}
WIDTH, EXPERTS, CHOSEN = 256, 8, 2
SHAPES = {  # batch, context, an expert's width
    "4096 tokens": (8, 512, 512),
    "2048 tokens": (8, 256, 704),
    "1024 tokens": (4, 256, 352),
}


def main() -> int:
    """Measure all shapes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--precision", default="highest", choices=["highest", "medium"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(options.precision)
    torch.use_deterministic_algorithms(True)  # as in training
    torch.utils.deterministic.fill_uninitialized_memory = False
    good = True
    for name, (batch, context, width) in SHAPES.items():
        kernel, timed = expert_kernels.measure(
            EXPERTS, WIDTH, width, batch * context, CHOSEN, torch.float32, torch.device("cpu")
        )
        times = ", ".join(f"{each} {1e3 * best:.1f} ms" for each, best in timed.items())
        print(f"{name}: kernel {kernel} ({times})", flush=True)
        seconds = measure(batch, context, width, options.blocks, kernel)
        speed = {side: batch * context / best for side, best in seconds.items()}
        for other, floor in FLOORS.items():
            ratio = speed["escala"] / speed[other]
            good &= ratio >= floor
            print(
                f"{name}, experts {width} wide, {options.precision}: escala {speed['escala']:.0f} tokens/s, "
                f"{other} {speed[other]:.0f}, ratio {ratio:.3f} (floor {floor})",
                flush=True,
            )
    return 0 if good else 1


def measure(
    batch: int, context: int, width: int, blocks: int, kernel: ExpertKernel = "slices"
) -> dict[str, float]:
    """Best CPU seconds of a forward and backward pass, by side."""
    torch.manual_seed(0)
    sides = build(width)
    for mixture in mixtures(sides["escala"]):
        mixture.experts.kernel = kernel
    x_BTD = torch.randn(batch, context, WIDTH, requires_grad=True)
    best = dict.fromkeys(sides, float("inf"))
    for block in range(blocks):
        for name, module in list(sides.items())[:: 1 if block % 2 else -1]:
            start = time.process_time()
            step(module, x_BTD)
            best[name] = min(best[name], time.process_time() - start)
    return best


def build(width: int) -> dict[str, nn.Module]:
    """The three sides: k experts of `width` are as many active FLOPs as one dense layer of k x `width`."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = ModelConfig(
        d_model=WIDTH, d_ff=width, moe={"experts": EXPERTS, "chosen": CHOSEN, "capacity_factor": None}
    )
    theirs = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=WIDTH,
            intermediate_size=width,
            num_local_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            experts_implementation="eager",  # its fastest of those that train on CPU
        )
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=WIDTH**-0.5)
    assert config.moe is not None
    return {
        "escala": MixtureOfExperts(config, config.moe, 1.0),
        "dense": FeedForward(WIDTH, CHOSEN * width, 1.0),
        "mixtral": theirs,
    }


def step(module: nn.Module, x_BTD: Tensor) -> None:
    """One forward and backward pass."""
    loss = module(x_BTD).square().mean()
    for mixture in mixtures(module):
        assert mixture.routing is not None
        loss = loss + sum(mixture.routing.losses.values())
    loss.backward()
    x_BTD.grad = None
    module.zero_grad()


if __name__ == "__main__":
    sys.exit(main())
