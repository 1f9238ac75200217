"""Memory that planning predicts, against what the device's allocator counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from escala.planning.cost import kv_cache_bytes_per_token, memory_bytes
from escala.schema import TrainedConfig
from escala.schema.hardware import Device
from tests.gpu.checks import each_precision, model_of, tokens_of
from tests.gpu.figures import Figures
from tests.gpu.memory import peak_bytes
from tests.gpu.training import PlainEngine, gradient
from workloads.generation.network import Network
from workloads.model.transformer import Transformer

pytestmark = pytest.mark.gpu
# A plan must not promise room that is not there. It counts what backward frees as still held (an allocator's cache
# keeps it), so it is above the peak of what lives: 1.15 to 1.45 times, by live tensors on the CPU.
LEAST, MOST = 0.97, 1.7
SOURCED = {"value": 1e12, "source": "of no account here"}
DEVICE = Device.model_validate(
    {
        "about": "",
        "memory_bytes": SOURCED,
        "memory_bytes_per_second": SOURCED,
        "peak_flops_per_second": {"bf16": SOURCED},
        "utilization": {"value": 0.5, "source": "of no account here"},
    }
)
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"training": {"precision": "fp32"}},
    "bf16": {"training": {"precision": "bf16"}},
    "bf16 checkpointed": {"training": {"precision": "bf16", "activation_checkpointing": True}},
    "bf16 experts": {
        "training": {"precision": "bf16"},
        "model": {"moe": {"experts": 8, "chosen": 2, "d_ff": 512, "capacity_factor": 1.25}},
    },
}


def asked(case: str, on_card: bool) -> TrainedConfig:
    """On a card 200 M parameters and 8,192 tokens."""
    large = {"vocab_size": 32768, "n_layers": 12, "d_model": 1024, "n_heads": 16, "n_kv_heads": 4}
    small = {"vocab_size": 512, "n_layers": 3, "d_model": 128, "n_heads": 4, "n_kv_heads": 2}
    context, batch = (1024, 8) if on_card else (128, 4)
    shape = {**(large if on_card else small), "max_context_tokens": context}
    changes = CASES[case]
    return TrainedConfig.model_validate(
        {
            "model": {**shape, **changes.get("model", {})},
            "training": {**changes["training"], "batch_sequences": batch, "zero_stage": 0},
        }
    )


@pytest.mark.parametrize("case", CASES)
def test_a_training_step(case: str, device: torch.device, figures: Figures, alone: None) -> None:
    config = asked(case, device.type == "cuda")
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    shape = (config.training.batch_sequences, config.context_tokens + 1)
    tokens = tokens_of(config.model.vocab_size, *shape).to(device)
    drawn = Transformer(config.model).to(dtype)

    def work() -> None:
        engine = PlainEngine(drawn.to(device), config.training)
        for _ in range(2):
            gradient(engine, tokens)
            engine.update(1e-4)

    predicted, found = memory_bytes(config, DEVICE).total, peak_bytes(work, device)
    if device.type == "cpu":  # its weights were there before
        found += sum(p.nbytes for p in drawn.parameters())
    figures.add(
        f"peak memory of a training step, {case}",
        f"{found / 1e6:.0f} MB",
        f"planned {predicted / 1e6:.0f} MB",
    )
    assert LEAST <= predicted / found <= MOST


@each_precision
def test_the_cache_of_an_engine(dtype: torch.dtype, device: torch.device, figures: Figures) -> None:
    """To the byte: keys and values are two allocations of whole blocks."""
    net, states = Network(model_of(device, dtype)), []
    found = peak_bytes(lambda: states.append(net.decode_state(128, 32)), device)
    predicted = kv_cache_bytes_per_token(net.config, dtype.itemsize) * 128 * 32
    figures.add(
        f"cache of 4,096 tokens, {str(dtype)[6:]}",
        f"{found / 1e6:.2f} MB",
        f"planned {predicted / 1e6:.2f} MB",
    )
    assert found == predicted
