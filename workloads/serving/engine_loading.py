"""What a replica starts with: its engine, and the version of its weights."""

from __future__ import annotations

import torch

from escala.rollouts.weights import WeightVersion, digest_of
from escala.schema.serve import ServeConfig
from workloads.data.chat import ChatTokenizer
from workloads.generation.engines import make_engine
from workloads.generation.protocol import EngineProtocol
from workloads.model.transformer import Transformer
from workloads.serving.weights import PRECISIONS, pack


def build_engine(model: Transformer, tokenizer: ChatTokenizer, config: ServeConfig) -> EngineProtocol:
    """The engine of one replica, on the GPU where it has one. Raises SpecError where its limits can't hold."""
    device = torch.device("cuda" if config.replica_gpus else "cpu")
    return make_engine(config.engine, model.to(device, PRECISIONS[config.precision]), tokenizer)


def initial_version(model: Transformer, precision: str) -> WeightVersion:
    """Version 0. A mixture that drops tokens in generation, too, says so (docs/theory B.5)."""
    moe = model.config.moe
    capacity = None if moe is None else moe.evaluation_capacity_factor
    return WeightVersion(0, digest_of(pack(model.state_dict())), precision, capacity)
