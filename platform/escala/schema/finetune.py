"""The `sft`, `reward` and `dpo` workloads: training that starts from a model that is there."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from escala.schema.base import StoredPath, Strict
from escala.schema.pretrained import with_model_of_start
from escala.schema.training import LoraConfig, StartConfig, TrainedConfig

CONTEXT_TOKENS = 1024  # of a fine-tuning run that states none: a pretrained model may take 100 times as many


class FineTuneConfig(TrainedConfig):
    """What the three share. `model` follows from `start`; a model drawn at random, without one, needs a tokenizer."""

    start: StartConfig | None = None
    tokenizer: StoredPath | None = Field(
        None,
        description="a tokenizer.json, or a directory with one; None: the one that stands beside the start",
    )
    lora: LoraConfig | None = Field(None, description="None: all weights are trained")

    @model_validator(mode="before")
    @classmethod
    def _read_start(cls, data: Any) -> Any:
        return with_model_of_start(data)

    @model_validator(mode="after")
    def _has_tokenizer(self) -> FineTuneConfig:
        if self.start is None and self.tokenizer is None:
            raise ValueError("give start (a model to start from), or tokenizer for a model drawn at random")
        experts = {"gate", "up", "down"} & set(self.lora.targets if self.lora else ())
        if self.model.moe is not None and experts:
            raise ValueError(
                f"lora.targets {sorted(experts)}: experts have no deltas; name attention's matrices"
            )
        return self

    def check_workers(self) -> None:
        """Raise ValueError where the workers cannot share the batch, or the experts."""
        super().check_workers()
        shared = self.model.moe is not None and self.model.moe.expert_parallel and self.resources.workers > 1
        if shared and self.lora is not None and self.lora.base != "fp32":
            raise ValueError(
                f"lora.base {self.lora.base}: experts in codes are not shared by workers; set lora.base to fp32, or "
                "train with one worker"
            )

    @property
    def starts_from(self) -> StartConfig | None:
        """The model that the run starts from; None: weights drawn at random."""
        return self.start

    @property
    def adapter(self) -> LoraConfig | None:
        """The deltas that are trained; None: all weights are."""
        return self.lora

    @property
    def context_tokens(self) -> int:
        """Tokens in a training sequence, at most."""
        return self.training.context_tokens or min(CONTEXT_TOKENS, self.model.max_context_tokens)


class ExamplesConfig(Strict):
    """Examples as JSON lines."""

    train: StoredPath = Field(description="a file of JSON lines")
    held_out: StoredPath | None = Field(None, description="None: a fraction of train, by hash of the content")
    held_out_fraction: float = Field(0.05, gt=0, lt=0.5, description="of train, where held_out is not given")


class SftDataConfig(ExamplesConfig):
    """`{"prompt": ..., "completion": ...}` or `{"messages": [{"role": ..., "content": ...}, ...]}` a line; there the
    assistant's messages of `weight` 0 are not trained on.
    """

    packing: bool = Field(True, description="several dialogues in a sequence, none of which sees another")


class SftConfig(FineTuneConfig):
    """The `sft` workload: next-token loss on the answers alone. `training.batch_sequences` counts packed sequences."""

    data: SftDataConfig


class RewardTrainingConfig(FineTuneConfig):
    """The `reward` workload (docs/theory C.7): prompt, chosen, rejected, perhaps a margin; batches of pairs."""

    data: ExamplesConfig


class DpoConfig(FineTuneConfig):
    """The `dpo` workload (Rafailov et al. 2023; docs/theory C.9), on lines as `reward` has; batches count pairs."""

    keeps_reference: ClassVar[bool] = True
    forward_passes: ClassVar[int] = 1  # the reference's

    data: ExamplesConfig
    beta_dpo: float = Field(
        0.1, gt=0, description="weight of the log-ratio to the reference: larger stays closer to it"
    )
