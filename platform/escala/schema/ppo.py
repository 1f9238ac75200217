"""The `ppo` workload: RLHF and RLAIF (docs/theory C)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from escala.schema.base import StoredPath, Strict
from escala.schema.compression import BITS, Precision, QuantizationConfig
from escala.schema.finetune import FineTuneConfig
from escala.schema.model import ModelConfig
from escala.schema.pretrained import model_config_of
from escala.schema.rewards import RewardConfig
from escala.schema.speculation import SpeculationConfig
from escala.schema.training import OptimizerConfig, StartConfig, TrainingConfig


class PpoOptimizerConfig(OptimizerConfig):
    """The actor's, with defaults for a pretrained model; its steps are iterations."""

    learning_rate: float = Field(1e-5, gt=0, description="peak, after the warm-up")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "constant",
        description="after the warm-up: cosine falls at once, wsd stays and falls in its last steps, constant stays",
    )
    weight_decay: float = Field(0.0, ge=0, description="on matrices only: norms and biases are not decayed")


class PpoTrainingConfig(TrainingConfig):
    """`steps` are iterations, `batch_sequences` follows from `batch`, `context_tokens` hold prompt and response."""

    optimizer: PpoOptimizerConfig = PpoOptimizerConfig()


class SamplingConfig(Strict):
    """How responses are drawn: from the whole vocabulary, since a filter's log-probabilities are not the policy's."""

    temperature: float = Field(1.0, gt=0, description="the learner's log-probabilities are taken at it, too")
    max_response_tokens: int = Field(64, gt=0, description="a longer response is cut off")


class RolloutServiceConfig(Strict):
    """The job's own rollout service: `policy` and, where a reward is a model, `reward`."""

    replicas: int = Field(1, gt=0, description="of the policy")
    replica_cpus: float = Field(1.0, gt=0, description="of each replica")
    replica_gpus: float = Field(0.0, ge=0, description="of each replica")
    max_running: int = Field(32, gt=0, description="responses in a replica's batch")
    speculation: SpeculationConfig | None = Field(
        None, description="as an engine has it; None: no tokens are drafted"
    )
    precision: Precision | None = Field(
        None,
        description="of the weights that draw responses, made of the learner's full ones at each publication; None: "
        "training.precision. int8 and int4 need policy_loss.importance_cap",
    )
    quantization: QuantizationConfig = Field(QuantizationConfig(), description="how, under int8 and int4")
    kernels: str | None = Field(
        None,
        description="which kernels multiply, `form=rows/tiles;...`, for numbers that equal another job's to the last "
        "bit; None: measured when the job starts, and kept for its later attempts",
    )
    timeout_seconds: float = Field(
        600.0, gt=0, description="for an iteration's responses, and for its rewards"
    )


class PpoBatchConfig(Strict):
    """An iteration, counted over all workers."""

    prompts: int = Field(32, gt=0, description="different ones, a multiple of the workers")
    responses_per_prompt: int = Field(1, gt=0, description="drawn for each prompt")
    epochs: int = Field(4, gt=0, description="times that each response is learned from")
    minibatches: int = Field(1, gt=0, description="optimiser steps of an epoch")
    micro_batch_tokens: int = Field(
        8192, gt=0, description="in one forward pass of one worker, padding included"
    )


class ShapingConfig(Strict):
    """From scores to rewards: normalise, clip, then subtract penalties."""

    normalise: bool = Field(False, description="by mean and spread of all scores so far")
    clip: float | None = Field(None, gt=0, description="scores to within +-clip")
    missing_eos_penalty: float = Field(0.0, ge=0, description="of a response that was cut off")
    length_penalty: float = Field(0.0, ge=0, description="of one of max_response_tokens")
    length_free_tokens: int = Field(0, ge=0, description="from here on the penalty grows, in a line")


class AdvantageConfig(Strict):
    """The estimator. `gae` learns a critic and is whitened; `grpo`, `dr_grpo`, `rloo` compare a prompt's responses."""

    kind: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_plus_plus"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1, description="of gae and reinforce_plus_plus")
    lam: float = Field(0.95, ge=0, le=1, description="of gae")
    bootstrap: bool = Field(
        True,
        description="of gae: a response that is cut off goes on, worth what the critic says, beside its reward; false: "
        "it ends there. Where the critic starts as the reward model, true counts such a response's reward twice",
    )


class CriticConfig(Strict):
    """A value head on a transformer, all of it trained."""

    start: StartConfig | None = Field(
        None, description="a reward model or another model; None: the actor's start"
    )
    model: ModelConfig | None = Field(None, description="follows from start")
    learning_rate: float = Field(1e-5, gt=0, description="peak, on the actor's schedule")
    value_clip: float | None = Field(None, gt=0, description="of a value's move from the old one")
    warmup_iterations: int = Field(0, ge=0, description="first ones, in which the actor is frozen")

    @model_validator(mode="before")
    @classmethod
    def _read_start(cls, data: Any) -> Any:
        path = (data.get("start") or {}).get("path") if isinstance(data, dict) else None
        if path is None or data.get("model"):
            return data
        return {**data, "model": model_config_of(Path(path).expanduser())}


class PolicyLossConfig(Strict):
    """Clipped surrogate: the ratio stays within [1 - clip_low, 1 + clip_high]."""

    mode: Literal["token", "sequence_mean", "gspo"] = Field(
        "token",
        description="the mean over tokens, over responses' means, or with one ratio a response (GSPO)",
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="how far below 1 the ratio may count")
    clip_high: float = Field(0.2, gt=0, description="how far above 1 the ratio may count")
    dual_clip: float | None = Field(
        None, gt=1, description="for an advantage A below 0 the loss is at most so many |A|; None: no bound"
    )
    entropy_coefficient: float = Field(0.0, ge=0, description="of the entropy that is added to the objective")
    importance_cap: float | None = Field(
        None, ge=1, description="advantages are multiplied by min(pi/pi_engine, cap); None: by 1"
    )


class KlConfig(Strict):
    """KL(policy|reference); `target_nats` and what is compared with it are of a whole response."""

    place: Literal["reward", "loss"] = Field(
        "reward", description="subtracted from each token's reward, or added to the loss"
    )
    estimator: Literal["k1", "k2", "k3"] | None = Field(
        None, description="None: k1 in the reward, k3 in the loss"
    )
    coefficient: float = Field(
        0.05, ge=0, allow_inf_nan=False, description="of the KL; an adaptive controller starts from it"
    )
    controller: Literal["fixed", "proportional", "threshold"] = Field(
        "fixed", description="of the coefficient: fixed, or moved towards target_nats"
    )
    target_nats: float | None = Field(None, gt=0, description="KL of a response that is wanted")
    horizon_episodes: float = Field(10_000, gt=0, description="of the proportional controller")
    early_stop_multiple: float | None = Field(
        None,
        gt=0,
        description="an iteration's updates end once KL(policy before them|policy) is above so many targets",
    )
    limit_nats_per_token: float = Field(4.0, gt=0, description="above it the run is stopped as diverged")

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("estimator") is not None:
            return data
        return {**data, "estimator": "k3" if data.get("place") == "loss" else "k1"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.place == "reward") != (self.estimator == "k1"):
            raise ValueError(
                "k1 belongs into the reward (in the loss the expectation of its gradient is zero), "
                "k2 and k3 into the loss"
            )
        adaptive = self.controller != "fixed"
        if adaptive and self.coefficient == 0:
            raise ValueError(f"a {self.controller} controller multiplies the coefficient, and 0 stays 0")
        if (adaptive or self.early_stop_multiple) and self.target_nats is None:
            raise ValueError("an adaptive controller and an early stop need target_nats")
        if self.target_nats is not None and not adaptive and self.early_stop_multiple is None:
            raise ValueError("target_nats has no use with a fixed coefficient and no early stop")
        return self


class PpoConfig(FineTuneConfig):
    """The `ppo` workload. Prompts as JSON lines of `prompt`; `training.steps` counts iterations."""

    keeps_reference: ClassVar[bool] = True
    forward_passes: ClassVar[int] = 3  # generation, the old log-probabilities, the reference's
    cost_note: ClassVar[str] = (
        "PPO: responses are taken as of full length; memory is the actor's and its reference's alone, without "
        "critic and rollout service; waiting for the service is not in the time"
    )

    training: PpoTrainingConfig = PpoTrainingConfig()
    prompts: StoredPath = Field(description="a file of JSON lines with prompt")
    rewards: list[RewardConfig] = Field(
        min_length=1,
        description="weighted and summed: functions run on the workers, models and judges are served",
    )
    sampling: SamplingConfig = SamplingConfig()
    rollouts: RolloutServiceConfig = RolloutServiceConfig()
    batch: PpoBatchConfig = PpoBatchConfig()
    shaping: ShapingConfig = ShapingConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    critic: CriticConfig | None = Field(None, description="of gae; None: from the actor's start, or none")
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    kl: KlConfig = KlConfig()
    mode: Literal["synchronous", "one_step_off"] = Field(
        "synchronous",
        description="one_step_off: the next responses are drawn while this iteration's are learned from",
    )

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, data: Any) -> Any:
        """The batch in sequences, and the critic of gae."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        training, batch = data.get("training") or {}, data.get("batch") or {}
        if not isinstance(training, dict) or not isinstance(batch, dict):
            return data  # the fields' own checks report it
        sizes = [batch.get(n, f.default) for n, f in PpoBatchConfig.model_fields.items()][:2]
        if all(isinstance(size, int) for size in sizes):
            rows = sizes[0] * sizes[1]
            if training.get("batch_sequences", rows) != rows:
                raise ValueError(
                    f"training.batch_sequences follows from batch: {rows} responses an iteration; leave it out"
                )
            data["training"] = {**training, "batch_sequences": rows}
        advantage = data.get("advantage") or {}
        kind = advantage.get("kind", "gae") if isinstance(advantage, dict) else "gae"
        if kind == "gae" and data.get("critic") is None:
            data["critic"] = {}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        for reason in self._contradictions():
            raise ValueError(reason)
        return self

    def check_workers(self) -> None:
        """Raise ValueError where the workers cannot share the batch."""
        super().check_workers()
        prompts, workers = self.batch.prompts, self.resources.workers
        if prompts % workers:
            raise ValueError(f"batch.prompts {prompts} is not a multiple of {workers} workers")

    def _contradictions(self) -> list[str]:
        """What makes no sense together, and why."""
        training, batch, kind = self.training, self.batch, self.advantage.kind
        rows = self.training.batch_sequences
        columns = [reward.column for reward in self.rewards if not reward.is_served]
        free, most = self.shaping.length_free_tokens, self.sampling.max_response_tokens
        refused = {
            "training.train_tokens can't be kept: responses are as long as they come; give training.steps": (
                training.train_tokens is not None
            ),
            "training.micro_batch_sequences has no use: batch.micro_batch_tokens cuts micro-batches": (
                training.micro_batch_sequences is not None
            ),
            "training.evaluate_every_steps has no use: each iteration's rewards are its evaluation": (
                training.evaluate_every_steps is not None
            ),
            f"batch.minibatches {batch.minibatches} are more than the {rows} responses": batch.minibatches
            > rows,
            f"{kind} compares a prompt's responses: set batch.responses_per_prompt to 2 or more": (
                kind in ("grpo", "dr_grpo", "rloo") and batch.responses_per_prompt < 2
            ),
            **{reason: True for r in self.rewards if (reason := r.contradiction(batch.responses_per_prompt))},
            "two reward functions have the same name, by which their means are recorded: rename one": (
                len(set(columns)) < len(columns)
            ),
            f"{kind} takes no critic: leave it out, or use gae": kind != "gae" and self.critic is not None,
            "shaping.normalise needs two responses an iteration": self.shaping.normalise and rows < 2,
            f"sampling.max_response_tokens {most} leaves no room for a prompt in {self.context_tokens} tokens": (
                most >= self.context_tokens
            ),
            f"batch.micro_batch_tokens {batch.micro_batch_tokens} is less than one sequence of "
            f"{self.context_tokens} tokens": batch.micro_batch_tokens < self.context_tokens,
            f"shaping.length_free_tokens {free} is not below max_response_tokens {most}": (
                self.shaping.length_penalty > 0 and free >= most
            ),
            "lora.dropout makes the ratio of two policies a ratio of two masks: set it to 0": (
                self.lora is not None and self.lora.dropout > 0
            ),
            "one_step_off learns from responses of older weights: set policy_loss.importance_cap": (
                self.mode == "one_step_off" and self.policy_loss.importance_cap is None
            ),
            f"kl.horizon_episodes {self.kl.horizon_episodes:g} is not above a fifth of the {rows} responses": (
                self.kl.controller == "proportional" and self.kl.horizon_episodes <= rows / 5
            ),
            f"rollouts.precision {self.rollouts.precision} draws from other weights than the learner's: set "
            "policy_loss.importance_cap": (
                self.rollouts.precision in BITS and self.policy_loss.importance_cap is None
            ),
            "rollouts.quantization has no use without rollouts.precision int8 or int4": (
                self.rollouts.precision not in BITS and self.rollouts.quantization != QuantizationConfig()
            ),
            "a mixture of experts is not trained by ppo: its balance losses are not added here": (
                self.model.moe is not None
            ),
            "critic.warmup_iterations leave no iteration for the actor": (
                self.critic is not None and self.critic.warmup_iterations >= self.total_steps
            ),
            "the critic's vocabulary is not the actor's: both read the same tokens": (
                self.critic_model is not None and self.critic_model.vocab_size != self.model.vocab_size
            ),
            "the critic's context is shorter than training.context_tokens": (
                self.critic_model is not None and self.critic_model.max_context_tokens < self.context_tokens
            ),
        }
        return [reason for reason, holds in refused.items() if holds]

    @property
    def critic_model(self) -> ModelConfig | None:
        """What the critic's transformer is; None without a critic."""
        return None if self.critic is None else self.critic.model or self.model

    @property
    def epochs(self) -> int:
        """Times that an iteration learns from each of its responses."""
        return self.batch.epochs

    @property
    def micro_batch_sequences(self) -> int:
        """An estimate, for plans: responses of full length in one forward pass; a divisor of a worker's."""
        mine = max(1, self.training.batch_sequences // self.resources.workers)
        most = max(1, self.batch.micro_batch_tokens // self.context_tokens)
        return next(size for size in range(min(mine, most), 0, -1) if mine % size == 0)

    @property
    def samples_every_iterations(self) -> int:
        """Iterations between two tables of samples."""
        return max(1, self.total_steps // 20)
