"""What each rank of test_zero.py does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from escala.schema import ModelConfig, TrainingConfig
from escala.storage.checkpoints import latest, open_checkpoints
from workloads.model.transformer import Transformer
from workloads.training import checkpoint, zero
from workloads.training.gradient import accumulate
from workloads.training.loss import next_token_loss

# d_model 33: norms and the embedding have an odd number of elements, which two ranks cannot halve.
MODEL = ModelConfig(
    vocab_size=101, n_layers=2, d_model=33, n_heads=2, head_dim=16, d_ff=48, max_context_tokens=16
)
BATCH, CONTEXT = 8, 16
TOKENS = BATCH * CONTEXT


def training(stage: int, precision: str = "fp32", clip: float | None = 0.5) -> TrainingConfig:
    return TrainingConfig(
        steps=50, zero_stage=stage, precision=precision, zero_param_persistence_threshold=0,
        optimizer={"learning_rate": 1e-2, "clip_norm": clip},
    )  # fmt: skip


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 20, (BATCH, CONTEXT + 1), generator=generator)


def model(config: ModelConfig = MODEL) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config)


def engine_for(config: TrainingConfig, micro_steps: int = 2, architecture: ModelConfig = MODEL) -> Any:
    micro_batch = BATCH // micro_steps // dist.get_world_size()
    return zero.make_engine(model(architecture), config, micro_batch, micro_steps)


def run(engine: Any, config: TrainingConfig, steps: range, micro_steps: int = 2) -> list[float]:
    """Mean loss of each step over all ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in steps:
        micro_batches = batch(step).chunk(ranks)[rank].chunk(micro_steps)
        total = accumulate(engine, micro_batches, micro_steps, TOKENS, next_token_loss)
        zero.set_learning_rate(engine, 1e-2 / (1 + step))
        zero.optimizer_step(engine, config)
        sums = total.double().reshape(1)
        dist.all_reduce(sums)
        losses.append(sums.item() / TOKENS)
    return losses


def plain(steps: range, architecture: ModelConfig = MODEL) -> list[float]:
    """The same in plain PyTorch: one process, one batch, clip_grad_norm_, unfused AdamW."""
    network = model(architecture)
    optimizer = torch.optim.AdamW(zero.parameter_groups(network, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in steps:
        tokens = batch(step)
        loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def resumed(
    stage: int, precision: str, directory: Path, architecture: ModelConfig = MODEL
) -> dict[str, list[float]]:
    """Six steps in one go, and three, a checkpoint, and three more in a new engine."""
    config = training(stage, precision)
    straight = engine_for(config, architecture=architecture)
    first = run(straight, config, range(3))
    manifest = {"config": {"model": architecture.model_dump()}, "fingerprints": {"tokenizer": "none"}}
    checkpoint.save(straight, open_checkpoints(directory), 3, manifest, keep=2)
    rest = run(straight, config, range(3, 6))
    found, refused = latest(open_checkpoints(directory))
    assert found is not None
    assert not refused
    torch.manual_seed(1)  # other weights: the checkpoint must bring all of them
    second = zero.make_engine(Transformer(architecture), config, BATCH // 2 // dist.get_world_size(), 2)
    checkpoint.load(second, found)
    return {"straight": first + rest, "resumed": run(second, config, range(3, 6))}


def elsewhere(stage: int, precision: str, directory: Path) -> list[float]:
    """Resume what two ranks wrote with another number of ranks."""
    config = training(stage, precision)
    found, _ = latest(open_checkpoints(directory))
    assert found is not None
    engine = engine_for(config)
    checkpoint.load(engine, found)
    return run(engine, config, range(3, 6))


def scenario(directory: Path) -> dict[str, Any]:
    ranks = dist.get_world_size()
    results: dict[str, Any] = {}
    if ranks == 1:
        results["plain"] = plain(range(50))
    for stage in (0, 3):
        config = training(stage)
        engine = engine_for(config)
        results[f"losses-{stage}"] = run(engine, config, range(50 if stage == 3 or ranks == 1 else 5))
        results[f"held-{stage}"] = zero.parameters_held(engine)
        results["total"] = sum(torch.Size(s).numel() for s in zero.parameter_shapes(engine).values())
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            where = f"{stage}-{precision}"
            results[f"resume-{where}"] = resumed(stage, precision, directory / f"{ranks}-{where}")
    if ranks == 1:
        for source, target in ((3, 0), (1, 3), (0, 2)):
            results[f"elsewhere-{source}"] = elsewhere(target, "fp32", directory / f"2-{source}-fp32")
    return results


LEARNED = {"kind": "learned", "count": 8}
KINDS: dict[str, dict[str, Any]] = {
    "window": {"attention": "window", "window_tokens": 5},
    "features": {"attention": "features"},
    "features, learned": {"attention": "features", "features": LEARNED},
    "nystrom": {"attention": {"kind": "nystrom", "landmarks": 2}, "window_tokens": 8},
    "hybrid": {"attention": "hybrid", "window_tokens": 8},
    "hybrid, learned": {"attention": "hybrid", "window_tokens": 8, "features": LEARNED},
    "hybrid, nothing far": {"attention": "hybrid", "features": LEARNED},
    "nystrom, nothing far": {"attention": "nystrom"},
}


def kinds(directory: Path) -> dict[str, Any]:
    """Every kind of attention: plain PyTorch, and two ranks at every stage, with a checkpoint on the way."""
    results: dict[str, Any] = {}
    for name, changes in KINDS.items():
        architecture = ModelConfig(**{**MODEL.model_dump(), "attention": "exact", **changes})
        results[f"{name}-plain"] = plain(range(6), architecture)
        for stage in (0, 1, 2, 3):
            where = directory / f"{name}-{stage}"
            results[f"{name}-{stage}"] = resumed(stage, "fp32", where, architecture)
    return results
