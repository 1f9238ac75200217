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
from workloads.config.model import ModelConfig
from workloads.config.moe import Annealing, BalanceConfig, MoEConfig
from workloads.config.pretrain import PretrainConfig
from workloads.config.training import OptimizerConfig, ResourcesConfig, TrainingConfig

__all__ = [
    "WORKLOADS",
    "Annealing",
    "BalanceConfig",
    "BenchConfig",
    "Corpus",
    "DataConfig",
    "FilesCorpus",
    "HuggingFaceCorpus",
    "JsonlCorpus",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "PythonSourceCorpus",
    "ResourcesConfig",
    "StoredPath",
    "Strict",
    "TokenizerConfig",
    "TrainingConfig",
]

WORKLOADS: dict[str, tuple[str, type[Strict]]] = {
    "pretrain": ("workloads.pretrain", PretrainConfig),
}
"""Name that a user types -> (module that the cluster runs, class that checks its configuration)."""
