"""What each rank of test_reward_zero.py does: the losses of a few Bradley-Terry steps under ZeRO-3, and rank 0's of the
same in plain PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from escala.schema import ModelConfig, TrainingConfig
from workloads.model.transformer import Transformer
from workloads.rewards.reward_model import RewardModel, pad_right
from workloads.training import zero

MODEL = ModelConfig(
    vocab_size=101, n_layers=2, d_model=33, n_heads=2, head_dim=16, d_ff=48, tie_embeddings=False
)
PAIRS, STEPS, RATE = 8, 6, 1e-2


def pairs(step: int) -> tuple[Tensor, Tensor]:
    """Chosen rows, then rejected ones, of all ranks; the chosen end with a smaller token."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(1, 9, (2 * PAIRS,), generator=generator).tolist()
    rows = [torch.randint(20, 100, (n,), generator=generator).tolist() for n in lengths]
    last = torch.randint(0, 10, (2 * PAIRS,), generator=generator).tolist()
    marked = [
        [*row, x + (10 if i >= PAIRS else 0)] for i, (row, x) in enumerate(zip(rows, last, strict=True))
    ]
    return pad_right(marked, 0, torch.device("cpu"))


def loss_sum(model: nn.Module, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    chosen_B, rejected_B = model(tokens_BT, lengths_B).chunk(2)
    return -F.logsigmoid(chosen_B - rejected_B).sum()


def model() -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(Transformer(MODEL))


def plain() -> list[float]:
    network, losses = model(), []
    optimizer = torch.optim.AdamW(zero.parameter_groups(network, 0.1), lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_sum(network, *pairs(step)) / PAIRS
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def zero3() -> list[float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = TrainingConfig(
        zero_stage=3, zero_param_persistence_threshold=0, optimizer={"clip_norm": None}
    )  # nothing stays whole, so a parameter that is used outside of its module is missing
    engine, losses = zero.make_engine(model(), config, PAIRS // ranks, 1), []
    for step in range(STEPS):
        tokens_BT, lengths_B = pairs(step)
        mine = torch.arange(2 * PAIRS).view(2, ranks, -1)[:, rank].flatten()
        total = loss_sum(engine, tokens_BT[mine], lengths_B[mine])
        engine.backward(total * ranks / PAIRS, scale_wrt_gas=False)
        zero.set_learning_rate(engine, RATE)
        zero.optimizer_step(engine, config)
        sums = total.detach().double().reshape(1)
        dist.all_reduce(sums)
        losses.append(sums.item() / PAIRS)
    return losses


def scenario(_: Path) -> dict[str, Any]:
    return {"zero3": zero3(), "plain": plain() if dist.get_rank() == 0 else None}
