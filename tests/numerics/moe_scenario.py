"""What each rank of test_moe_zero.py does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from escala.schema import LoraConfig, ModelConfig, TrainingConfig
from escala.storage.checkpoints import latest, open_checkpoints
from workloads.model.lora import add_lora
from workloads.model.moe import mixtures
from workloads.model.transformer import Transformer
from workloads.model.weights import load_weights
from workloads.training import checkpoint, zero
from workloads.training.experts import Routers, expert_group
from workloads.training.gradient import accumulate
from workloads.training.loss import next_token_loss

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
        Transformer(model, expert_group(model.moe)),
        config,
        BATCH // MICRO_STEPS // dist.get_world_size(),
        MICRO_STEPS,
    )


def changed(**moe: Any) -> ModelConfig:
    """MODEL with other experts."""
    return ModelConfig(**{**MODEL.model_dump(), "moe": {**MODEL.model_dump()["moe"], **moe}})


def run(
    engine: Any, config: TrainingConfig, steps: range, with_balance: bool, norms: list[float] | None = None
) -> list[float]:
    """Mean loss of each step over all ranks; `norms` gets each step's gradient norm."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    routers, losses = Routers(engine.module, 100), []
    for step in steps:
        routers.begin_step(step)
        micro_batches = batch(step).chunk(ranks)[rank].chunk(MICRO_STEPS)
        auxiliary = routers.loss if with_balance else None
        total = accumulate(engine, micro_batches, MICRO_STEPS, BATCH * CONTEXT, next_token_loss, auxiliary)
        zero.set_learning_rate(engine, 1e-2 / (1 + step))
        norm = zero.optimizer_step(engine, config)
        if norms is not None:
            norms.append(norm)
        sums = total.double().reshape(1)
        dist.all_reduce(sums)
        losses.append(sums.item() / BATCH / CONTEXT)
    return losses


def one_pass(engine: Any) -> tuple[int, list[list[float]]]:
    """Bytes that this rank sends in a forward pass, and the tokens that each layer's experts get from it."""
    routers = Routers(engine.module, 100)
    before = routers.sent_bytes
    with torch.no_grad():
        engine(batch(9).chunk(2)[dist.get_rank()])
    loads = [mixture.routing.load_E.tolist() for mixture in mixtures(engine.module)]  # type: ignore[union-attr]
    return routers.sent_bytes - before, loads


def shared(directory: Path, results: dict[str, Any]) -> None:
    """Two ranks with their experts shared and not, at each stage and precision, and with full experts; and resumed."""
    for name, stage, precision, moe in (
        ("alone", 0, "fp32", {}),
        ("alone-bf16", 2, "bf16", {}),
        ("full", 0, "fp32", {"capacity_factor": 0.75}),
        ("full-shared", 0, "fp32", {"capacity_factor": 0.75, "expert_parallel": True}),
        *((f"shared-{s}-{p}", s, p, {"expert_parallel": True}) for s in (0, 1, 2) for p in ("fp32", "bf16")),
    ):
        config = TrainingConfig(steps=50, zero_stage=stage, precision=precision, optimizer={"clip_norm": 0.5})
        engine = start(config, changed(**moe))
        norms = results[f"norms-{name}"] = []
        results[name] = run(engine, config, range(6), True, norms)
        results[f"held-{name}"] = zero.parameters_held(engine)
        if name == "shared-2-fp32":
            results["sent"], results["loads"] = one_pass(engine)
        engine.eval()
        with torch.no_grad():
            results[f"evaluated-{name}"] = float(engine(batch(9)[:, :-1]).double().square().mean())
    for name, is_shared in (("lora", False), ("lora-shared", True)):
        # frozen experts, of a model that had them all
        config = TrainingConfig(steps=50, zero_stage=2, optimizer={"clip_norm": 0.5})
        torch.manual_seed(0)
        model = Transformer(changed(expert_parallel=is_shared))
        add_lora(model, LoraConfig(rank=2))
        Routers(model, 100)
        engine = zero.make_engine(model, config, BATCH // MICRO_STEPS // 2, MICRO_STEPS)
        results[name] = run(engine, config, range(4), with_balance=False)
        results[f"held-{name}"] = zero.parameters_held(engine)
    for precision in ("fp32", "bf16"):  # and resumed, without auxiliary losses, so that one rank can follow
        config = TrainingConfig(steps=50, zero_stage=2, precision=precision, optimizer={"clip_norm": 0.5})
        kept = directory / ("shared" if precision == "fp32" else "shared-bf16")
        engine = start(config, changed(expert_parallel=True))
        run(engine, config, range(3), with_balance=False)
        found = checkpoint.save(engine, open_checkpoints(kept), 3, MANIFEST, keep=2)
        results["files"] = len(found.manifest["files"])
        results[f"straight-{precision}"] = run(engine, config, range(3, 6), with_balance=False)
        engine = start(config, changed(expert_parallel=True))
        checkpoint.load(engine, found)
        results[f"resumed-{precision}"] = run(engine, config, range(3, 6), with_balance=False)
    results["shapes"] = {n: list(w.shape) for n, w in load_weights(found).items()}


def scenario(directory: Path) -> dict[str, Any]:
    ranks = dist.get_world_size()
    torch.use_deterministic_algorithms(True)
    checkpoint.FILE_BYTES = 10_000  # several files a rank
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
        checkpoint.save(engine, open_checkpoints(directory / f"{ranks}-{stage}"), 3, MANIFEST, keep=2)
        results[f"balanced-{stage}"] = losses + run(engine, config, range(3, 6), with_balance=True)
    if ranks == 2:
        shared(directory, results)
    if ranks == 1:
        # resume at stage 0 what two ranks wrote at stage 3, and what they wrote with shared experts
        config = TrainingConfig(steps=50, zero_stage=0, optimizer={"clip_norm": 0.5})
        for name, source, with_balance in (("elsewhere", "2-3", True), ("unshared", "shared", False)):
            found, _ = latest(open_checkpoints(directory / source))
            assert found is not None
            engine = start(config)
            checkpoint.load(engine, found)
            results[name] = run(engine, config, range(3, 6), with_balance)
    return results
