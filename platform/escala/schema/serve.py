"""The rollout service: what `workloads.serve:application` is built from."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from escala.contract.records import Rates
from escala.schema.base import StoredPath, Strict
from escala.schema.compression import StoredWeights
from escala.schema.engines import KINDS, EngineSection
from escala.schema.governor import GovernorConfig
from escala.schema.rewards import RewardConfig
from escala.schema.rewards.judge import JudgeModelConfig

POLICY = "policy"
"""The deployment that generates, and that scales."""


class ScalingConfig(Strict):
    """How many replicas, and when (see `escala.rollouts.policy.Rules`)."""

    min_replicas: int = Field(
        1, ge=0, description="0: an idle deployment goes, and comes back with a request"
    )
    max_replicas: int = Field(1, ge=1, description="however much waits")
    requests_per_replica: float | None = Field(None, gt=0, description="None: engine.max_running")
    drain_seconds: float = Field(30.0, gt=0, description="queued tokens shall be done within")
    up_seconds: float = Field(3.0, ge=0, description="that a need for more must last")
    down_seconds: float = Field(60.0, ge=0, description="that a surplus must last")
    spare: float = Field(
        0.2, ge=0, lt=1, description="share of the smaller number that must be left over before replicas go"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class OwnerConfig(Strict):
    """The process that an application ends with (`workloads.serving.owner`)."""

    token: str = Field(description="NAMESPACE/NAME of the actor that it holds")
    lock: str = Field(description="the file that is locked by who starts or ends Serve")


class ServeConfig(StoredWeights):
    """The application: `policy` generates, `reward` and `judge` score where they are given, `api` speaks HTTP."""

    model: StoredPath = Field(
        description="a directory of safetensors in Hugging Face's layout, a .gguf file, or a job's checkpoints"
    )
    name: str | None = Field(None, min_length=1, description="in /v1/models; None: the directory's")
    kernels: str | None = Field(
        None,
        description="which kernels multiply, `form=rows/tiles;...` as `/weights` shows them: a replica that can't have "
        "them refuses; None: the first replica measures, the others follow",
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="of a mixture: an expert's share of a request's tokens over the even one, beyond which choices are "
        "dropped (docs/theory B.5); None: the model's own, mostly none dropped",
    )
    engine: EngineSection = KINDS.read({})
    scaling: ScalingConfig = ScalingConfig()
    reward: list[RewardConfig] = Field([], description="weighted and summed; none: no such deployment")
    judge: JudgeModelConfig | None = Field(None, description="None: no such deployment")
    replica_cpus: float = Field(1.0, gt=0, description="of each replica")
    replica_gpus: float = Field(0.0, ge=0, description="of each replica")
    governor: GovernorConfig | None = Field(
        None, description="keeps the latency within `scaling`'s bounds; None: the policy alone scales"
    )
    rates: dict[str, Any] | None = Field(
        None, description="of the cluster's energy and carbon; `escala rollouts up` takes them from its file"
    )
    hold_places: bool = Field(
        False,
        description="hold the CPUs of replicas beside them, so that a dead one's are not given to a job meanwhile; for "
        "a cluster of one node (set for the local one, also for a job's own service), and not with GPUs",
    )
    max_staleness: int | None = Field(
        None,
        ge=0,
        description="versions that a response may be behind the newest; None: it only says which it is",
    )
    sync_seconds: float = Field(120.0, gt=0, description="a request waits for an announced version at most")
    shutdown_seconds: float = Field(
        600.0, gt=0, description="a leaving replica may take to finish its responses"
    )
    owner: OwnerConfig | None = Field(None, description="a job; None: it runs until somebody takes it down")
    token_sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="of the bearer token; None: loopback only, and no token"
    )

    @field_validator("rates")
    @classmethod
    def _are_rates(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            return None if value is None else vars(Rates(**value))
        except TypeError as error:
            raise ValueError(f"these are not the rates of a cluster: {error}") from error

    @property
    def cluster_rates(self) -> Rates | None:
        """`rates` as a record."""
        return None if self.rates is None else Rates(**self.rates)

    @property
    def holds_places(self) -> bool:
        """Whether replicas reserve nothing themselves: a GPU is given to who reserves it."""
        return self.hold_places and not self.replica_gpus

    def governed(self) -> dict[str, Any] | None:
        """The governor's file, as the scaling policy takes it. A job's service keeps its capacity factor: its learner
        counts on the function that its responses are from.
        """
        if self.governor is None:
            return None
        kept = (
            self.governor if self.owner is None else self.governor.model_copy(update={"capacity_factors": []})
        )
        return kept.model_dump(mode="json")

    def autoscaling(self) -> dict[str, Any]:
        """Serve's AutoscalingConfig of the policy deployment, as plain data."""
        scaling = self.scaling
        return {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.requests_per_replica or float(self.engine.max_running),
            "metrics_interval_s": 1.0,  # Serve's own 10 s would be the time of the first reaction
            "look_back_period_s": 5.0,  # 1 never scales
            "upscale_delay_s": 0.0,  # persistence is the policy's
            "downscale_delay_s": 0.0,
            "policy": {
                "policy_function": "escala.rollouts.serve_hook:ScalingPolicy",
                "policy_kwargs": {
                    "governor": self.governed(),
                    "rates": self.rates,
                    "drain_seconds": scaling.drain_seconds,
                    "up_seconds": scaling.up_seconds,
                    "down_seconds": scaling.down_seconds,
                    "spare": scaling.spare,
                },
            },
        }
