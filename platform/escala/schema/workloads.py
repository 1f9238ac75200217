"""The workloads: what a user may submit, one record each. Nothing else tests a workload's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from escala.contract.errors import SpecError
from escala.schema.base import Strict
from escala.schema.finetune import DpoConfig, RewardTrainingConfig, SftConfig
from escala.schema.judge import JudgeConfig
from escala.schema.ppo import PpoConfig
from escala.schema.pretrain import PretrainConfig


@dataclass(frozen=True)
class Workload:
    """A kind of job.

    Args:
        name: what a user types.
        entry_point: the module that the cluster runs.
        config: the class that checks its configuration.
    """

    name: str
    entry_point: str
    config: type[Strict]

    def parse(self, plain: dict[str, Any]) -> Any:
        """The checked configuration. Raises pydantic.ValidationError."""
        return self.config(**plain)


WORKLOADS: dict[str, Workload] = {
    each.name: each
    for each in (
        Workload("pretrain", "workloads.pretrain", PretrainConfig),
        Workload("sft", "workloads.sft", SftConfig),
        Workload("reward", "workloads.reward", RewardTrainingConfig),
        Workload("dpo", "workloads.dpo", DpoConfig),
        Workload("ppo", "workloads.ppo", PpoConfig),
        Workload("judge", "workloads.judge", JudgeConfig),
    )
}


def get_workload(name: str) -> Workload:
    """The workload called `name`. Raises SpecError."""
    if name not in WORKLOADS:
        raise SpecError(f"there is no workload {name!r}", f"valid: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
