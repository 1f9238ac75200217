"""The kernels of a training job: chosen once, by rank 0, for all ranks, and kept in its checkpoints (docs/theory A.9).

Another kernel rounds differently: a resumed run follows the choice that its checkpoint states, or is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import nn

from escala.contract.errors import CheckpointError
from escala.schema import TrainedConfig
from escala.schema.moe import ExpertKernel
from escala.storage.checkpoints import Checkpoint
from workloads.model.expert_kernels import KERNELS, measure
from workloads.model.moe import MixtureOfExperts, mixtures
from workloads.training.agreement import from_first_rank

EXPERTS = "experts"
"""What a manifest's `kernels` calls a mixture's."""


def choose_kernels(model: nn.Module, config: TrainedConfig, device: torch.device) -> dict[str, str]:
    """Set the kernels of `model`: those that `config` states, or the fastest here. A collective call; returns what a
    manifest keeps, empty where there is nothing to choose.
    """
    layers = mixtures(model)
    if not layers:
        return {}
    kernel = config.training.expert_kernel or _fastest(layers[0], config, device)
    return _set(layers, kernel)


def follow_kernels(model: nn.Module, found: Checkpoint) -> dict[str, str] | None:
    """Set the kernels that a checkpoint was written with. None: it does not say; it is older than the choice.

    Raises CheckpointError for one that this version does not have.
    """
    stored: Any = found.manifest.get("kernels")
    layers = mixtures(model)
    if not isinstance(stored, dict) or (layers and EXPERTS not in stored):
        return None
    if not layers:
        return {}
    kernel = next((known for known in KERNELS if known == stored[EXPERTS]), None)
    if kernel is None:
        raise CheckpointError(
            f"checkpoint {found.address} was trained with the kernel {stored[EXPERTS]!r} for its experts, which this "
            f"version does not have: {', '.join(KERNELS)}",
            "resume it with the version of escala that wrote it",
        )
    return _set(layers, kernel)


def _set(layers: list[MixtureOfExperts], kernel: ExpertKernel) -> dict[str, str]:
    for layer in layers:
        layer.experts.kernel = kernel
    return {EXPERTS: kernel}


def _fastest(layer: MixtureOfExperts, config: TrainedConfig, device: torch.device) -> ExpertKernel:
    """Rank 0 measures for all."""
    chosen = 0
    if torch.distributed.get_rank() == 0:
        ranks = 1 if layer.exchange is None else layer.exchange.ranks
        mine, slots = layer.moe.experts // ranks, layer.moe.trained_experts
        each = min(slots, mine)
        name, seconds = measure(
            mine,
            config.model.d_model,
            config.model.expert_size,
            config.micro_batch_sequences * config.context_tokens * slots // each,
            each,
            torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
            device,
        )
        times = ", ".join(f"{kernel} {1e3 * best:.1f} ms" for kernel, best in seconds.items())
        print(f"kernel of the experts: {name} ({times})", flush=True)
        chosen = KERNELS.index(name)
    return KERNELS[from_first_rank(chosen, device)]
