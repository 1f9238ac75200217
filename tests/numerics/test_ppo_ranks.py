"""A PPO iteration over micro-batches and two real gloo processes, ZeRO-0 and ZeRO-3, against plain PyTorch on whole
minibatches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.numerics.ranks import run_ranks

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks("ppo_scenarios:scenario", 2, tmp_path_factory.mktemp("ppo"))[0]


@pytest.mark.parametrize("stage", ["0", "3"])
def test_an_iteration_equals_plain_pytorch_on_whole_minibatches(found: Any, stage: str) -> None:
    ours, plain = found[stage], found["plain"]
    for name, column in plain["columns"].items():
        torch.testing.assert_close(ours["columns"][name], column, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    for model in ("actor", "critic"):
        assert ours[model].keys() == plain[model].keys()
        for name, weight in plain[model].items():
            torch.testing.assert_close(ours[model][name], weight, **CLOSE)
    assert ours["updates"]["steps"] == 4
    assert ours["updates"]["gradient_norm"] > 0
    assert ours["updates"]["update_kl_nats"] > 0


@pytest.mark.parametrize("stage", ["0", "3"])
def test_both_engines_resume_bit_for_bit_and_the_actor_is_the_model(found: Any, stage: str) -> None:
    ours = found[stage]
    for model in ("actor", "critic"):
        for name, weight in ours["straight"][model].items():
            assert torch.equal(ours["resumed"][model][name], weight), (model, name)
            if weight.ndim == 2:
                assert not torch.equal(ours[model][name], weight)  # it went on learning
    assert ours["actor_only"]


def test_a_lora_actor_publishes_plain_weights_and_is_its_own_reference(found: Any) -> None:
    lora = found["lora"]
    assert lora["published"].keys() == lora["merged"].keys()
    for name, weight in lora["merged"].items():
        torch.testing.assert_close(lora["published"][name], weight, **CLOSE)
    assert lora["reference"] < 1e-6


def test_whitening_spans_the_ranks(found: Any) -> None:
    x = torch.arange(8.0)
    torch.testing.assert_close(found["lora"]["white"][0], ((x - x.mean()) / x.std())[:4])
