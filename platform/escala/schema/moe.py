"""A mixture of experts in place of a feed-forward layer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from escala.schema.base import Strict

Estimator = Literal["top_k", "straight_through", "gumbel", "soft_to_hard"]
ExpertKernel = Literal["slices", "runs", "padded"]
ANNEALED = ("gumbel", "soft_to_hard")


class Annealing(Strict):
    """A temperature that falls geometrically from `start` to `end`, and stays there."""

    start: float = Field(1.0, gt=0, description="temperature at the first step")
    end: float = Field(0.1, gt=0, description="temperature after the fall; not above start")
    fraction: float = Field(0.8, gt=0, le=1, description="share of the run's steps that the fall takes")

    @model_validator(mode="after")
    def _falls(self) -> Annealing:
        if self.end > self.start:
            raise ValueError(f"tau rises from {self.start:g} to {self.end:g}; end must not exceed start")
        return self


class BalanceConfig(Strict):
    """A loss on the mean routing probabilities (docs/theory B.4). Its weight falls in a micro-batch whose hard load is
    even.
    """

    kind: Literal["switch", "quadratic", "symmetric_kl"] = "switch"
    weight: float = Field(0.01, gt=0, description="lambda; a layer's loss counts so much, layers add up")
    balanced_load_ratio: float = Field(
        1.25, ge=1, description="max over mean load of a layer's micro-batch that counts as balanced"
    )
    balanced_fraction: float = Field(0.1, ge=0, le=1, description="of the weight, where it is balanced")


class MoEConfig(Strict):
    """E experts of which each token passes through k (docs/theory B). Raises ValueError for what contradicts itself."""

    experts: int = Field(8, ge=2, description="E")
    chosen: int = Field(2, gt=0, description="k")
    d_ff: int | None = Field(None, gt=0, description="SwiGLU width of one expert; None: the model's d_ff")
    shared_experts: int = Field(0, ge=0, description="experts that every token passes through besides")
    every: int = Field(1, gt=0, description="each so many-th layer has experts, the others are dense")
    capacity_factor: float | None = Field(
        1.25,
        gt=0,
        description="in training a rank's expert takes ceil(factor x tokens x k / E) of a micro-batch; None: all come",
    )
    evaluation_capacity_factor: float | None = Field(
        None,
        gt=0,
        description="in evaluation and generation, of each sequence by itself: up to its n-th token an expert takes "
        "ceil(factor x n x k / E); None: nothing is dropped",
    )
    estimator: Estimator = Field(
        "top_k",
        description="how the choice is made and differentiated in training: top_k by its exact derivative",
    )
    tau: Annealing | None = Field(None, description="temperature of gumbel and soft_to_hard")
    noise_std: float = Field(0.0, ge=0, description="of normal noise on the logits, in training")
    margin: float = Field(0.0, ge=0, description="wanted between the k-th logit and the next")
    margin_weight: float = Field(0.0, ge=0, description="gamma")
    z_loss_weight: float = Field(0.0, ge=0, description="of the mean square of logits' log-sum-exp")
    hinge_weight: float = Field(0.0, ge=0, description="of the expected load above capacity, by capacity")
    balance: BalanceConfig | None = BalanceConfig()
    collapse_load_ratio: float | None = Field(
        None,
        gt=1,
        description="max over mean load that is an event; None: halfway from even to the most, E/k",
    )

    expert_parallel: bool = Field(
        False,
        description="in training each worker holds and computes its share of the experts, for all workers' tokens",
    )

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        estimator = data.get("estimator", "top_k")
        if estimator in ANNEALED and data.get("tau") is None:
            data["tau"] = {}
        if estimator == "soft_to_hard":
            data.setdefault("capacity_factor", None)
        experts, chosen = data.get("experts", 8), data.get("chosen", 2)
        counts = isinstance(experts, int) and isinstance(chosen, int) and chosen > 0
        if data.get("collapse_load_ratio") is None and counts and experts > chosen:
            data["collapse_load_ratio"] = (1 + experts / chosen) / 2
        return data

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.chosen >= self.experts:
            raise ValueError(
                f"chosen {self.chosen} of {self.experts} experts is a dense layer; choose fewer than there are"
            )
        most = self.experts / self.chosen
        if self.collapse_load_ratio is not None and self.collapse_load_ratio >= most:
            raise ValueError(
                f"collapse_load_ratio {self.collapse_load_ratio:g} is never exceeded: at most {most:g}"
            )
        if self.tau is not None and self.estimator not in ANNEALED:
            raise ValueError(f"estimator {self.estimator} has no temperature: take out tau")
        if self.estimator == "gumbel" and self.noise_std:
            raise ValueError("estimator gumbel draws its own noise: take out noise_std")
        if self.estimator == "soft_to_hard" and self.capacity_factor is not None:
            raise ValueError(
                "estimator soft_to_hard sends every token to every expert in training: no capacity_factor"
            )
        if self.hinge_weight and self.capacity_factor is None:
            raise ValueError("hinge_weight is for load above capacity: give capacity_factor")
        if (self.margin > 0) != (self.margin_weight > 0):
            raise ValueError("margin and margin_weight go together: one without the other does nothing")
        return self

    def check_workers(self, workers: int, zero_stage: int) -> None:
        """Raise ValueError where so many workers at that ZeRO stage cannot share the experts as asked. One worker has
        them all, at any stage.
        """
        if not self.expert_parallel or workers == 1:
            return
        if self.experts % workers:
            raise ValueError(
                f"moe.expert_parallel gives each worker an equal share: {self.experts} experts, {workers} workers"
            )
        if zero_stage == 3:
            raise ValueError(
                "moe.expert_parallel goes with ZeRO stages 0 to 2: stage 3 gathers all experts on every worker, "
                "which then computes them with less traffic than by sending tokens"
            )

    @property
    def trained_experts(self) -> int:
        """Experts that compute a token in training: k, or all of a dense mixture."""
        return self.experts if self.estimator == "soft_to_hard" else self.chosen

    @property
    def collapse_ratio(self) -> float:
        """collapse_load_ratio, never None after validation."""
        return self.collapse_load_ratio or (1 + self.experts / self.chosen) / 2
