"""The rollout service's part in PPO without Serve: one engine in this process, the same interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from escala.rollouts.weights import WeightVersion
from workloads.data.tokenizer import TextTokenizer
from workloads.generation.engine import Engine
from workloads.generation.protocol import SamplingParams
from workloads.model.transformer import Transformer
from workloads.serving.records import Generated


class LocalService:
    """What `workloads.serving.client.Rollouts` offers.

    Args:
        score: the served reward, of (prompts, responses).
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextTokenizer,
        score: Callable[[Sequence[Any], Sequence[str]], list[float]] | None = None,
    ) -> None:
        self.engine = Engine(model, tokenizer, threads=None)
        self.asked: list[tuple[list[list[int]], list[SamplingParams], int]] = []
        self.score = score

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], min_version: int = 0
    ) -> list[Generated]:
        assert self.engine.weights_version >= min_version
        self.asked.append((list(prompts), list(params), min_version))
        found = self.engine.generate(prompts, params)
        return [
            Generated(one, WeightVersion(one.weights_version, "0", "fp32"), len(prompt))
            for one, prompt in zip(found, prompts, strict=True)
        ]

    def publish(self, state: Mapping[str, Tensor], version: int, *, timeout_seconds: float = 0.0) -> None:
        self.engine.load_weights(state, version)
