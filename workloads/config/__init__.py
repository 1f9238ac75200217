"""What a user may write about a workload, validated: pydantic and the standard library only.

The control plane reads these classes to check a spec before anything starts; the workload reads the same ones on
the cluster. Unknown keys fail. A field that is None is derived by the validator of its own class, and only there.
"""

from __future__ import annotations

from workloads.config.base import StoredPath, Strict
from workloads.config.bench import BenchConfig
from workloads.config.data import (
    Corpus,
    DataConfig,
    FilesCorpus,
    HuggingFaceCorpus,
    JsonlCorpus,
    PythonSourceCorpus,
    TokenizerConfig,
)
from workloads.config.finetune import (
    DpoConfig,
    ExamplesConfig,
    FineTuneConfig,
    LoraConfig,
    RewardTrainingConfig,
    SftConfig,
    SftDataConfig,
    StartConfig,
)
from workloads.config.judge import JudgeConfig
from workloads.config.model import ModelConfig
from workloads.config.moe import Annealing, BalanceConfig, MoEConfig
from workloads.config.ppo import PpoConfig
from workloads.config.pretrain import PretrainConfig
from workloads.config.training import OptimizerConfig, ResourcesConfig, TrainedConfig, TrainingConfig

__all__ = [
    "WORKLOADS",
    "Annealing",
    "BalanceConfig",
    "BenchConfig",
    "Corpus",
    "DataConfig",
    "DpoConfig",
    "ExamplesConfig",
    "FilesCorpus",
    "FineTuneConfig",
    "HuggingFaceCorpus",
    "JsonlCorpus",
    "JudgeConfig",
    "LoraConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PpoConfig",
    "PretrainConfig",
    "PythonSourceCorpus",
    "ResourcesConfig",
    "RewardTrainingConfig",
    "SftConfig",
    "SftDataConfig",
    "StartConfig",
    "StoredPath",
    "Strict",
    "TokenizerConfig",
    "TrainedConfig",
    "TrainingConfig",
]

WORKLOADS: dict[str, tuple[str, type[Strict]]] = {
    "pretrain": ("workloads.pretrain", PretrainConfig),
    "sft": ("workloads.sft", SftConfig),
    "reward": ("workloads.reward", RewardTrainingConfig),
    "dpo": ("workloads.dpo", DpoConfig),
    "ppo": ("workloads.ppo", PpoConfig),
    "judge": ("workloads.judge", JudgeConfig),
}
"""Name that a user types -> (module that the cluster runs, class that checks its configuration)."""
