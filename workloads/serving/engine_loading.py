"""What a replica starts with: its engine, and the version of its weights."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import torch

from escala.rollouts.weights import WeightVersion
from escala.schema.compression import BITS
from escala.schema.serve import ServeConfig
from workloads.data.chat import ChatTokenizer
from workloads.generation.engines import make_engine
from workloads.generation.network import MEASURED, Smaller
from workloads.generation.protocol import EngineProtocol
from workloads.model.compression.activation_aware import calibration_of
from workloads.model.transformer import Transformer
from workloads.serving.weights import PRECISIONS

log = logging.getLogger(__name__)


def build_engine(
    model: Transformer, tokenizer: ChatTokenizer, config: ServeConfig, kernels: str | None = None
) -> EngineProtocol:
    """The engine of one replica, on the GPU where it has one.

    Args:
        kernels: that the other replicas have; None: there is no choice yet, and they are measured.

    Raises SpecError where its limits can't hold, the kernels cannot be had here, the matrices can't be stored so, or a
    capacity factor can't be had (a dense model, drafted tokens).
    """
    device = torch.device("cuda" if config.replica_gpus else "cpu")
    smaller = None
    if config.precision in BITS:
        calibration_BT = calibration_of(config, tokenizer, model.config.max_context_tokens)
        smaller = Smaller(config.precision, config.quantization, calibration_BT)
    whole = model.to(device, PRECISIONS[config.precision])
    engine = make_engine(
        config.engine, whole, tokenizer, kernels or MEASURED, smaller, config.capacity_factor
    )
    log.info("weights of %d MB, kernels %s", engine.stats().weight_bytes // 10**6, engine.kernels)
    return engine


async def agreed_engine(
    store: Any, told: str | None, build: Callable[[str | None], EngineProtocol]
) -> EngineProtocol:
    """An engine with the kernels that all replicas have: those of the store, or what this one measured first.

    Args:
        store: the deployment's store actor.
        told: by the service's arguments; None: nothing.
        build: of kernels, None to measure; called again where another replica's choice came first.

    Raises what `build` does.
    """
    kernels = told or await store.kernels.remote()
    while True:
        engine = await asyncio.to_thread(build, kernels)
        kernels = await store.agree_on_kernels.remote(engine.kernels)
        if kernels == engine.kernels:
            return engine


def initial_version(digest: str, precision: str, engine: EngineProtocol) -> WeightVersion:
    """Version 0, as `engine` serves it. `digest`: of the model's weights, before the engine had them."""
    return WeightVersion(0, digest, precision, engine.capacity_factor, engine.kernels)
