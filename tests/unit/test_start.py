"""Models from checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from escala.contract.checkpoints import FORMAT_VERSION, file_entry
from escala.contract.sealed import seal
from escala.schema import LoraConfig, ModelConfig
from workloads.model.huggingface import save_pretrained
from workloads.model.lora import add_lora, merge_lora
from workloads.model.start import load_model
from workloads.model.transformer import Transformer
from workloads.rewards.reward_model import RewardModel


@pytest.mark.parametrize("tied", [True, False])
def test_the_trunk_of_a_reward_model_that_was_trained_by_lora(tied: bool, tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=64, n_layers=1, d_model=16, n_heads=2, tie_embeddings=tied)
    trunk = Transformer(config)
    save_pretrained(trunk, tmp_path / "start")
    add_lora(trunk, LoraConfig(rank=2))
    reward = RewardModel(trunk)
    for name, parameter in reward.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    directory = tmp_path / "checkpoints" / "step-00000001"
    directory.mkdir(parents=True)
    trained = {f"master/{n}": p.detach() for n, p in reward.named_parameters() if p.requires_grad}
    save_file(trained, directory / "rank.safetensors")
    spec = {
        "start": {"path": str(tmp_path / "start")},
        "model": config.model_dump(),
        "lora": {"rank": 2},
        "data": {"train": "pairs.jsonl"},
    }
    files = {"rank.safetensors": file_entry(directory / "rank.safetensors")}
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": 1,
        "files": files,
        "workload": "reward",
        "config": spec,
    }
    (directory / "manifest.json").write_text(json.dumps(seal(manifest)))
    tokens = torch.randint(0, 64, (2, 9))
    merge_lora(trunk)
    assert torch.allclose(load_model(directory).hidden(tokens), trunk.hidden(tokens), atol=1e-6)
