"""What one rank of test_moe_zero.py does; run as `python moe_scenario.py RANK RANKS DIRECTORY`. Writes
RANKS-RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from escala.manifests import latest
from tests.numerics.ranks import leave
from workloads.config import ModelConfig, TrainingConfig
from workloads.model.moe import mixtures
from workloads.model.transformer import Transformer
from workloads.training import checkpoint, zero
from workloads.training.experts import Routers
from workloads.training.step import accumulate, next_token_loss

MODEL = ModelConfig(
    vocab_size=101, n_layers=2, d_model=33, n_heads=2, head_dim=16, d_ff=48, max_context_tokens=16,
    moe={"experts": 4, "chosen": 2, "d_ff": 23, "shared_experts": 1, "capacity_factor": None, "z_loss_weight": 0.01},
)  # fmt: skip
BATCH, CONTEXT, MICRO_STEPS = 8, 16, 2
MANIFEST = {"config": {"model": MODEL.model_dump()}, "fingerprints": {"tokenizer": "none"}}


def batch(step: int) -> torch.Tensor:
    """The second half of the rows, which is rank 1's where there are two, has one token alone: one expert pair."""
    tokens = torch.randint(0, 20, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(step))
    tokens[BATCH // 2 :] = 7
    return tokens


def start(config: TrainingConfig, model: ModelConfig = MODEL) -> Any:
    torch.manual_seed(0)
    return zero.make_engine(
        Transformer(model), config, BATCH // MICRO_STEPS // dist.get_world_size(), MICRO_STEPS
    )


def run(engine: Any, config: TrainingConfig, steps: range, with_balance: bool) -> list[float]:
    """Mean loss of each step over all ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    routers, losses = Routers(engine.module, 100), []
    for step in steps:
        routers.begin_step(step)
        micro_batches = batch(step).chunk(ranks)[rank].chunk(MICRO_STEPS)
        auxiliary = routers.loss if with_balance else None
        total = accumulate(engine, micro_batches, MICRO_STEPS, BATCH * CONTEXT, next_token_loss, auxiliary)
        zero.set_learning_rate(engine, 1e-2 / (1 + step))
        zero.optimizer_step(engine, config)
        sums = total.double().reshape(1)
        dist.all_reduce(sums)
        losses.append(sums.item() / BATCH / CONTEXT)
    return losses


def main() -> None:
    rank, ranks, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", f"file://{directory}/store-{ranks}", rank=rank, world_size=ranks)
    results: dict[str, Any] = {}
    for stage in (0, 3):
        config = TrainingConfig(
            steps=50, zero_stage=stage, zero_param_persistence_threshold=0, optimizer={"clip_norm": 0.5}
        )
        engine = start(config)
        results[f"task-{stage}"] = run(engine, config, range(6), with_balance=False)
        idle = [int((mixture.routing.load_E == 0).sum()) for mixture in mixtures(engine.module)]  # type: ignore[union-attr]
        results[f"idle-{stage}"] = idle
        engine = start(config)
        losses = run(engine, config, range(3), with_balance=True)
        checkpoint.save(engine, directory / f"{ranks}-{stage}", 3, MANIFEST, keep=2)
        results[f"balanced-{stage}"] = losses + run(engine, config, range(3, 6), with_balance=True)
    if ranks == 2:  # the same with the experts' work shared, and at full experts
        for name, stage, change in (
            ("shared", 0, {"expert_parallel": True}),
            ("shared-2", 2, {"expert_parallel": True}),
            ("full", 0, {"capacity_factor": 0.75}),
            ("full-shared", 0, {"capacity_factor": 0.75, "expert_parallel": True}),
        ):
            model = ModelConfig(**{**MODEL.model_dump(), "moe": {**MODEL.model_dump()["moe"], **change}})
            config = TrainingConfig(steps=50, zero_stage=stage, optimizer={"clip_norm": 0.5})
            engine = start(config, model)
            results[name] = run(engine, config, range(6), with_balance=True)
            engine.eval()
            with torch.no_grad():
                results[f"evaluated-{name}"] = float(engine(batch(9)[:, :-1]).double().square().mean())
    if ranks == 1:  # resume at stage 0 what two ranks wrote at stage 3
        config = TrainingConfig(steps=50, zero_stage=0, optimizer={"clip_norm": 0.5})
        found, _ = latest(directory / "2-3")
        assert found is not None
        engine = start(config)
        checkpoint.load(engine, found)
        results["elsewhere"] = run(engine, config, range(3, 6), with_balance=True)
    (directory / f"{ranks}-{rank}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
