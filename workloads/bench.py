"""What one device does when all of its cluster work: `python -m workloads.bench ATTEMPT.json`. Reads top to bottom.

Every worker measures at the same time, between barriers: cores share memory and caches, and accelerators their
links and their power. Rank 0's figures are those of the slowest rank.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from escala.contract.records import write_json
from escala.schema import AttentionBenchConfig, BenchConfig, ModelConfig, TrainingConfig
from escala.schema.flops import flops_per_token
from escala.tracking.lineage.lifecycle import LiveAttempt, run_attempt
from workloads.model.transformer import Transformer
from workloads.training import meter, zero
from workloads.training.device import device_of, set_up_torch
from workloads.training.driver import allocator, start_workers
from workloads.training.failures import NodeWatch, classify
from workloads.training.gradient import accumulate
from workloads.training.loss import next_token_loss, token_loss

OPTIMIZER_PARAMETERS = 1 << 24  # 16.8 M: 270 MB of state, far beyond any cache
STREAM_ELEMENTS = 1 << 25
ON_GPU = 8  # times as many of both: launching 400 MB of traffic takes a tenth of its time there
MESSAGE_ELEMENTS = 1 << 23  # 32 MB in fp32: a gather of a large layer
SMALL_ELEMENTS = 64
LAYERS = 12  # as deep as a real model: two layers, weights and all, would sit in the cache
STAGES = (0, 1, 3)  # all-reduce once in a step; shard the optimiser; meet at every layer
LIMIT_BYTES = Path("/sys/fs/cgroup/memory.max")


def main(arguments: list[str]) -> int:
    """Run one attempt; returns the process's exit code."""
    return run_attempt(arguments, bench, partial(classify, nodes=None))


def bench(attempt: LiveAttempt) -> None:
    """See `run_bench`."""
    run_bench(attempt, BenchConfig.model_validate, measure, "device.json")


def run_bench(
    attempt: LiveAttempt,
    parse: Callable[[Any], BenchConfig | AttentionBenchConfig],
    measure: Callable[[dict[str, Any]], None],
    artifact: str,
) -> None:
    """Start the workers; what they `measure` is in the attempt's facts, and in its run as `artifact`."""
    import ray

    spec, files = attempt.spec, attempt.files
    config = attempt.open(parse)
    ray.init(address="auto", log_to_driver=True, namespace="escala")
    attempt.classify = partial(classify, nodes=NodeWatch())
    arguments = {"config": spec.config, "facts": str(files.facts)}
    start_workers(measure, arguments, config.resources, spec.directory, allocator())
    tracker, run_id = attempt.run
    found = json.loads(files.facts.read_text())
    tracker.text(run_id, artifact, json.dumps(found, indent=1, sort_keys=True))


def measure(arguments: dict[str, Any]) -> None:
    """One rank."""
    config = BenchConfig(**arguments["config"])
    device = device_of(config.resources)
    set_up_torch(config.resources)
    runtime = _runtime_bytes(device)  # first: what is freed before it would be taken for it
    meter.choose_matmul_precision("auto", device)
    found: dict[str, Any] = {
        "device": device_name(device),
        "workers": torch.distributed.get_world_size(),
        "runtime_bytes": runtime,
        "memory_bytes": _memory_bytes(device),
        "memory_bytes_per_second": _stream(device, config.seconds),
        "optimizer_parameters_per_second": _optimizer(device, config.seconds),
        **_links(device, config.seconds),
        "precisions": {name: _precision(name, config, device) for name in config.precisions},
    }
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found, indent=1), flush=True)
        write_json(Path(arguments["facts"]), found)


def _precision(name: str, config: BenchConfig, device: torch.device) -> dict[str, Any]:
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    peak = torch.tensor(meter.peak_flops(dtype, device), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MIN)
    blocks = {width: _block(width, dtype, config, device) for width in config.widths}
    return {
        "peak_flops_per_second": float(peak),
        "block": {width: train for width, (train, _) in blocks.items()},
        "recompute": {width: forward for width, (_, forward) in blocks.items()},
        "head": _head(dtype, config, device),
        "alone": _alone(dtype, config, device),
        "steps": [_step(name, stage, config, device) for stage in STAGES],
    }


def _block(width: int, dtype: torch.dtype, config: BenchConfig, device: torch.device) -> tuple[float, float]:
    """FLOP/s of LAYERS blocks of a `width`: forward and backward, and forward alone."""
    network, ids_BT, work = _network(width, dtype, config, device)

    def forward() -> None:
        with torch.no_grad():
            network.hidden(ids_BT)

    train = partial(_train, network, ids_BT)
    return work / _seconds(train, config.seconds), work / 3 / _seconds(forward, config.seconds)


def _alone(dtype: torch.dtype, config: BenchConfig, device: torch.device) -> float:
    """How much faster rank 0 trains its blocks while the others wait: what the workers take from each other."""
    network, ids_BT, _ = _network(_middle(config), dtype, config, device)
    together = _seconds(partial(_train, network, ids_BT), config.seconds)
    laps = []
    for _ in range(max(3, int(config.seconds / together))) if torch.distributed.get_rank() == 0 else ():
        start = time.perf_counter()
        _train(network, ids_BT)
        _wait()
        laps.append(time.perf_counter() - start)
    torch.distributed.barrier()
    alone = torch.tensor(sorted(laps)[len(laps) // 2] if laps else 0.0, dtype=torch.float64)
    torch.distributed.broadcast(alone, 0)
    return together / float(alone)


def _step(precision: str, stage: int, config: BenchConfig, device: torch.device) -> dict[str, float]:
    """Seconds of a whole training step under DeepSpeed, of the model that it says."""
    model, ranks = _model(_middle(config), config), torch.distributed.get_world_size()
    training = TrainingConfig.model_validate({"zero_stage": stage, "precision": precision})
    sequences = config.tokens // config.context_tokens
    engine = zero.make_engine(Transformer(model), training, sequences, 1)
    ids_BT1 = torch.randint(model.vocab_size, (sequences, config.context_tokens + 1)).to(device)

    def step() -> None:
        accumulate(engine, [ids_BT1], 1, config.tokens * ranks, next_token_loss)
        zero.optimizer_step(engine, training)

    seconds = _seconds(step, 2 * config.seconds)
    return {"n_layers": model.n_layers, "d_model": model.d_model, "zero_stage": stage, "seconds": seconds}


def _head(dtype: torch.dtype, config: BenchConfig, device: torch.device) -> float:
    """FLOP/s of the unembedding with the loss, forward and backward."""
    model = _model(_middle(config), config)
    network = Transformer(model).to(device, dtype)
    hidden = torch.randn(config.tokens, model.d_model).to(device, dtype).requires_grad_()
    targets = torch.randint(model.vocab_size, (1, config.tokens)).to(device)

    def train() -> None:
        network.zero_grad()
        total, _ = token_loss(network.logits(hidden)[None], targets)
        torch.autograd.backward(total)

    work = flops_per_token(model, config.context_tokens).logits * config.tokens
    return work / _seconds(train, config.seconds)


def _train(network: Transformer, ids_BT: Tensor) -> None:
    network.zero_grad()
    hidden = network.hidden(ids_BT)
    torch.autograd.backward(hidden, torch.ones_like(hidden))


def _network(
    width: int, dtype: torch.dtype, config: BenchConfig, device: torch.device
) -> tuple[Transformer, Tensor, float]:
    """A network, a micro-batch, and the FLOPs of its blocks' forward and backward."""
    model = _model(width, config)
    flops = flops_per_token(model, config.context_tokens)
    sequences = config.tokens // config.context_tokens
    ids_BT = torch.randint(model.vocab_size, (sequences, config.context_tokens)).to(device)
    return Transformer(model).to(device, dtype), ids_BT, (flops.matmul + flops.attention) * ids_BT.numel()


def _middle(config: BenchConfig) -> int:
    return config.widths[len(config.widths) // 2]


def _model(width: int, config: BenchConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=config.vocab_size,
        n_layers=LAYERS,
        d_model=width,
        n_heads=max(1, width // 64),
        max_context_tokens=config.context_tokens,
    )


def _stream(device: torch.device, seconds: float) -> float:
    """Bytes per second of c = a + b on arrays beyond any cache: two reads and a write (McCalpin's STREAM, 1995)."""
    elements = STREAM_ELEMENTS * (1 if device.type == "cpu" else ON_GPU)
    a, b = torch.rand(elements, device=device), torch.rand(elements, device=device)
    c = torch.empty_like(a)
    return 3 * 4 * elements / _seconds(lambda: torch.add(a, b, out=c), seconds)


def _optimizer(device: torch.device, seconds: float) -> float:
    """Parameters per second of the fused AdamW step that training uses."""
    parameters = OPTIMIZER_PARAMETERS * (1 if device.type == "cpu" else ON_GPU)
    parameter = torch.nn.Parameter(torch.zeros(parameters, device=device))
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    return parameters / _seconds(lambda: optimizer.step(), seconds)


def _links(device: torch.device, seconds: float) -> dict[str, float | None]:
    """Bytes per second that a rank sends in a large all-gather, and the time of a small one; None with one worker."""
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return {"link_bytes_per_second": None, "link_seconds": None}

    def gather(elements: int) -> float:
        part = torch.ones(elements // ranks, device=device)
        whole = torch.empty(elements, device=device)
        return _seconds(lambda: torch.distributed.all_gather_into_tensor(whole, part), seconds)

    small, large = gather(SMALL_ELEMENTS * ranks), gather(MESSAGE_ELEMENTS)
    sent = 4 * MESSAGE_ELEMENTS * (ranks - 1) / ranks
    return {"link_bytes_per_second": sent / max(large - small, 1e-9), "link_seconds": small}


def _seconds(work: Callable[[], object], seconds: float) -> float:
    """Median time of one call of `work` on the slowest rank, all ranks at work at once, over about `seconds`."""
    work()  # the first call allocates
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    once = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    torch.distributed.broadcast(once, 0)  # as many calls on every rank: collectives are among them
    laps = []
    for _ in range(max(3, int(seconds / max(float(once), 1e-6)))):
        start = time.perf_counter()
        work()
        _wait()
        laps.append(time.perf_counter() - start)
    median = torch.tensor(sorted(laps)[len(laps) // 2], dtype=torch.float64)
    torch.distributed.all_reduce(median, op=torch.distributed.ReduceOp.MAX)
    return float(median)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _runtime_bytes(device: torch.device) -> int:
    """What a rank's memory grows by when it trains a model too small to count: DeepSpeed, kernels, their buffers."""
    before = meter.memory_bytes(device)
    training, model = TrainingConfig(), ModelConfig(vocab_size=256, n_layers=2, d_model=64, n_heads=1)
    engine = zero.make_engine(Transformer(model), training, 1, 1)
    for _ in range(2):
        ids_BT1 = torch.randint(model.vocab_size, (1, 129), device=device)
        accumulate(engine, [ids_BT1], 1, 128 * torch.distributed.get_world_size(), next_token_loss)
        zero.optimizer_step(engine, training)
    return max(0, meter.memory_bytes(device) - before)


def _memory_bytes(device: torch.device) -> int:
    """What one worker may use: its GPU's memory, or its share of this machine's (or container's)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemTotal"))
    total = int(line.split()[1]) * 1024
    if LIMIT_BYTES.exists() and (limit := LIMIT_BYTES.read_text().strip()) != "max":
        total = min(total, int(limit))
    return total // torch.distributed.get_world_size()


def device_name(device: torch.device) -> str:
    """What it is, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "CPU")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
