"""What a user may write about a workload, validated: pydantic and the standard library only.

The control plane reads these classes to check a spec before anything starts; the workload reads the same ones on
the cluster. Unknown keys fail. A field that is None is derived by the validator of its own class, and only there.
"""

from __future__ import annotations

from escala.schema.base import StoredPath, Strict
from escala.schema.bench import AttentionBenchConfig, BenchConfig
from escala.schema.compress import CompressConfig
from escala.schema.convert import AutoFeaturesConfig, ConvertConfig
from escala.schema.data import (
    Corpus,
    DataConfig,
    FilesCorpus,
    HuggingFaceCorpus,
    JsonlCorpus,
    PythonSourceCorpus,
    RecallCorpus,
    TextCorpus,
    TokenizerConfig,
)
from escala.schema.finetune import (
    DpoConfig,
    ExamplesConfig,
    FineTuneConfig,
    RewardTrainingConfig,
    SftConfig,
    SftDataConfig,
)
from escala.schema.judge import JudgeConfig
from escala.schema.model import ModelConfig
from escala.schema.moe import Annealing, BalanceConfig, MoEConfig
from escala.schema.ppo import PpoConfig
from escala.schema.pretrain import PretrainConfig
from escala.schema.training import (
    LoraConfig,
    OptimizerConfig,
    ResourcesConfig,
    StartConfig,
    TrainedConfig,
    TrainingConfig,
)
from escala.schema.workloads import WORKLOADS, Workload, get_workload

__all__ = [
    "WORKLOADS",
    "Annealing",
    "AttentionBenchConfig",
    "AutoFeaturesConfig",
    "BalanceConfig",
    "BenchConfig",
    "CompressConfig",
    "ConvertConfig",
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
    "RecallCorpus",
    "ResourcesConfig",
    "RewardTrainingConfig",
    "SftConfig",
    "SftDataConfig",
    "StartConfig",
    "StoredPath",
    "Strict",
    "TextCorpus",
    "TokenizerConfig",
    "TrainedConfig",
    "TrainingConfig",
    "Workload",
    "get_workload",
]
