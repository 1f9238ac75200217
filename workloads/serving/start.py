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
    """A directory in Hugging Face's layout, its model on the CPU. Raises CheckpointError or DataError."""
    from workloads.data.chat import load_chat_tokenizer
    from workloads.model.huggingface import load_pretrained

    return load_pretrained(source), load_chat_tokenizer(Path(source))


def build_engine(model: Transformer, tokenizer: ChatTokenizer, config: ServeConfig) -> Engine:
    """The engine of one replica, on the GPU where it has one. Raises SpecError where its limits can't hold."""
    import torch

    from workloads.generation.engine import Engine

    device = torch.device("cuda" if config.replica_gpus else "cpu")
    limits = config.engine
    return Engine(
        model.to(device, PRECISIONS[config.precision]),
        tokenizer.text,
        max_running=limits.max_running,
        cache_tokens=limits.cache_tokens,
        block_tokens=limits.block_tokens,
        prefill_tokens=limits.prefill_tokens,
    )
