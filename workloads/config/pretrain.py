"""The `pretrain` workload."""

from __future__ import annotations

from pydantic import model_validator

from workloads.config.base import Strict
from workloads.config.data import DataConfig
from workloads.config.model import ModelConfig
from workloads.config.training import ResourcesConfig, TrainingConfig


class PretrainConfig(Strict):
    """The `pretrain` workload."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _fits(self) -> PretrainConfig:
        if self.context_tokens > self.model.max_context_tokens:
            raise ValueError(
                f"training.context_tokens {self.context_tokens} is longer than "
                f"model.max_context_tokens {self.model.max_context_tokens}"
            )
        ranks = self.resources.workers
        if self.training.batch_sequences % (ranks * self.micro_batch_sequences):
            raise ValueError(
                f"training.batch_sequences {self.training.batch_sequences} is not a multiple of "
                f"workers {ranks} x micro_batch_sequences {self.micro_batch_sequences}"
            )
        if self.model.moe is not None:
            self.model.moe.check_workers(ranks, self.training.zero_stage)
        if self.data.tokenizer.path is None and self.data.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size {self.data.tokenizer.vocab_size} does not fit "
                f"model.vocab_size {self.model.vocab_size}"
            )
        return self

    @property
    def context_tokens(self) -> int:
        """Tokens in a training sequence."""
        return self.training.context_tokens or self.model.max_context_tokens

    @property
    def micro_batch_sequences(self) -> int:
        """Sequences in one forward pass of one worker."""
        return self.training.micro_batch_sequences or max(
            1, self.training.batch_sequences // self.resources.workers
        )

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimiser step, over all workers."""
        return self.training.batch_sequences * self.context_tokens

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.training.train_tokens is None:
            return self.training.steps or 100
        return -(-self.training.train_tokens // self.step_tokens)

    @property
    def train_tokens(self) -> int:
        """Tokens that the whole run trains on (D)."""
        return self.total_steps * self.step_tokens

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        stated = self.training.optimizer.warmup_steps
        return min(500, self.total_steps // 20) if stated is None else stated

    @property
    def checkpoint_every_steps(self) -> int:
        """Steps between two checkpoints; 0: none."""
        stated = self.training.checkpoint_every_steps
        return max(1, self.total_steps // 10) if stated is None else stated
