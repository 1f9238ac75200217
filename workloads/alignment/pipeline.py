"""From the actor's weights to an iteration's responses: published, then drawn, at once or one step ahead."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed

from escala.schema import PpoConfig
from workloads.alignment.learner import policy_weights
from workloads.alignment.rollouts import PromptTokens, Response, RolloutSampler, RolloutService
from workloads.training.agreement import on_all_ranks


class RolloutPipeline:
    """One rank's part.

    Args:
        actor: the engine of the policy.
        prompts: all of them, the same on every rank.
    """

    def __init__(
        self, config: PpoConfig, service: RolloutService, actor: Any, prompts: Sequence[PromptTokens]
    ) -> None:
        self.config, self.service, self.actor = config, service, actor
        self.rank = torch.distributed.get_rank()
        self.sampler = RolloutSampler(config, prompts, self.rank, torch.distributed.get_world_size())
        self._in_flight: Future[list[Response]] | None = None
        self._background = ThreadPoolExecutor(1, "rollouts")

    def responses(self, iteration: int) -> list[Response]:
        """This rank's responses of `iteration`: drawn now, or, one step off, while the last one was learned from.

        A collective call. Raises AgreedError.
        """
        drawn = None
        if self._in_flight is not None:  # before the next weights: a response is of one version
            in_flight, self._in_flight = self._in_flight, None
            drawn = on_all_ranks(in_flight.result)
        version = iteration + 1  # 0 is what the service was started with
        self._publish(version)
        if drawn is None:
            drawn = on_all_ranks(lambda: self.sampler.draw(self.service, iteration, version))
        if self.config.mode == "one_step_off" and iteration + 1 < self.config.total_steps:
            self._in_flight = self._background.submit(self.sampler.draw, self.service, iteration + 1, version)
        return drawn

    def _publish(self, version: int) -> None:
        """Make the actor's weights those of the service."""
        weights = policy_weights(self.actor)
        seconds = self.config.rollouts.timeout_seconds

        def publish() -> None:
            if self.rank == 0:
                self.service.publish(weights, version, timeout_seconds=seconds)

        on_all_ranks(publish)

    def close(self) -> None:
        """Wait for nothing that is in flight."""
        self._background.shutdown(wait=False, cancel_futures=True)
