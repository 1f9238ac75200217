"""What a replica starts with: model, tokenizer and engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workloads.config.serve import ServeConfig
from workloads.serving.weights import PRECISIONS

if TYPE_CHECKING:
    from workloads.data.chat import ChatTokenizer
    from workloads.generation.engine import Engine
    from workloads.model.transformer import Transformer


def load_policy_model(source: str) -> tuple[Transformer, ChatTokenizer]:
    """Model (on the CPU, fp32) and tokenizer of what a run may start from: a directory in Hugging Face's layout, a
    .gguf file, a checkpoint, or a job's checkpoints. Raises CheckpointError, DataError or NotFoundError.
    """
    from workloads.model.start import load_model, load_tokenizer

    path = Path(source)
    return load_model(path), load_tokenizer(path)


def build_engine(model: Transformer, tokenizer: ChatTokenizer, config: ServeConfig) -> Engine:
    """The engine of one replica, on the GPU where it has one. Raises SpecError where its limits can't hold."""
    import torch

    from workloads.generation.engine import Engine

    device = torch.device("cuda" if config.replica_gpus else "cpu")
    limits = config.engine
    return Engine(
        model.to(device, PRECISIONS[config.precision]),
        tokenizer,
        max_running=limits.max_running,
        cache_tokens=limits.cache_tokens,
        block_tokens=limits.block_tokens,
        prefill_tokens=limits.prefill_tokens,
    )
