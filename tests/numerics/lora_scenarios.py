"""What each rank of test_lora_zero.py does.

The loss is DPO's against the model without its deltas, so each step passes the network twice, once without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from escala.schema import LoraConfig, ModelConfig, TrainingConfig
from escala.storage.checkpoints import latest, open_checkpoints
from workloads.alignment.losses import dpo_loss
from workloads.data.examples import Sequences, row_batch
from workloads.dpo import response_log_probabilities
from workloads.model.lora import add_lora, without_lora
from workloads.model.transformer import Transformer
from workloads.model.weights import load_weights
from workloads.training import checkpoint, zero
from workloads.training.finetune import halves

MODEL = ModelConfig(vocab_size=101, n_layers=2, d_model=33, n_heads=2, head_dim=16, d_ff=48)
LORA = LoraConfig(rank=3, targets=["query", "value", "down"])
CODED = LORA.model_copy(update={"base": "int8"})  # a scale for each output: 33 inputs have no groups
PAIRS, STEPS, RATE = 8, 8, 3e-2


def pairs(step: int) -> Sequences:
    """Chosen answers, then rejected ones, of all ranks; the chosen use small tokens."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for row in range(2 * PAIRS):
        low, high = (1, 4) if row < PAIRS else (50, 53)
        prompt = torch.randint(1, 101, (4,), generator=generator).tolist()
        answer = torch.randint(low, high, (3,), generator=generator).tolist()
        found.append((prompt + answer, [False] * 4 + [True] * 3))
    return Sequences.of(found)


def loss_sum(network: Any, module: Transformer, sequences: Sequences, chosen: list[int]) -> Tensor:
    rows = [[n] for n in chosen] + [[n + PAIRS] for n in chosen]
    batch = row_batch(sequences, rows)
    with torch.no_grad(), without_lora(module):
        reference = halves(response_log_probabilities(network, batch))
    policy = halves(response_log_probabilities(network, batch))
    return dpo_loss(*policy, *reference, 0.5) * len(chosen)


def model(lora: LoraConfig = LORA) -> Transformer:
    torch.manual_seed(0)
    built = Transformer(MODEL)
    add_lora(built, lora)
    return built


def plain(lora: LoraConfig = LORA) -> list[float]:
    network, losses = model(lora), []
    optimizer = torch.optim.AdamW(zero.parameter_groups(network, 0.0), lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_sum(network, network, pairs(step), list(range(PAIRS))) / PAIRS
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run(engine: Any, training: TrainingConfig, steps: range) -> list[float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in steps:
        total = loss_sum(engine, engine.module, pairs(step), list(range(rank, PAIRS, ranks)))
        engine.backward(total * ranks / PAIRS, scale_wrt_gas=False)
        zero.set_learning_rate(engine, RATE)
        zero.optimizer_step(engine, training)
        sums = total.detach().double().reshape(1)
        dist.all_reduce(sums)
        losses.append(sums.item() / PAIRS)
    return losses


def zero3(directory: Path, lora: LoraConfig = LORA) -> dict[str, Any]:
    """Half of the steps, a checkpoint, and the other half both straight on and from the checkpoint."""
    training = TrainingConfig(
        zero_stage=3,
        zero_param_persistence_threshold=0,
        optimizer={"clip_norm": None, "weight_decay": 0.0},
    )
    micro, half = PAIRS // dist.get_world_size(), STEPS // 2
    straight = zero.make_engine(model(lora), training, micro, 1)
    first = run(straight, training, range(half))
    saved = checkpoint.save(
        straight, open_checkpoints(directory), half, {"config": {}, "workload": "dpo"}, keep=1
    )
    rest = run(straight, training, range(half, STEPS))
    found, _ = latest(open_checkpoints(directory))
    assert found is not None
    again = zero.make_engine(model(lora), training, micro, 1)
    checkpoint.load(again, found)
    resumed = run(again, training, range(half, STEPS))
    names = sorted(load_weights(saved))
    return {"straight": first + rest, "resumed": first + resumed, "names": names}


def scenario(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, lora in {"": LORA, "coded_": CODED}.items():
        found[f"{name}zero3"] = zero3(directory / f"{name}checkpoints", lora)
        found[f"{name}plain"] = plain(lora) if dist.get_rank() == 0 else None
    return found
